"""How good a mixture is for its number of parameters: BIC, AIC and ICL, all lower for better."""

from __future__ import annotations

import math

__all__ = ["CRITERIA", "criteria"]

CRITERIA = ("bic", "aic", "icl")


def criteria(log_likelihood: float, entropy: float, n: float, n_parameters: int) -> dict[str, float]:
    """The three criteria by name.

    Args:
        log_likelihood: of all samples, in nats.
        entropy: of the responsibilities, summed over samples, in nats.
        n: number of samples.
        n_parameters: free ones.
    Source:
        Schwarz 1978 (BIC); Akaike 1974 (AIC); Biernacki, Celeux and Govaert 2000, eq. 3, with BIC for the integrated
        likelihood (ICL).
    """
    bic = -2 * log_likelihood + n_parameters * math.log(n)
    return {"bic": bic, "aic": -2 * log_likelihood + 2 * n_parameters, "icl": bic + 2 * entropy}
