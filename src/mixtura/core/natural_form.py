"""One pass of a Gaussian mixture over blocks of samples, in two matrix products a block.

A Gaussian is an exponential family: log weight + log density = theta . phi(x) with phi(x) = [x, 1, products x_i x_j]. So
the log densities of all components are one product, Theta (C, P) times Phi (P, B), and the statistics of all components
another, R (C, B) times Phi'. Every product x_i x_j is formed once a sample instead of once a component, which halves the
arithmetic of C triangular solves, and two large products run at a machine's full rate where 2 C small ones do not.

The form squares samples before it subtracts, so it cancels where a component is narrow and far from the origin. Against
that: samples are centred and scaled first, in float64; sums are float64; and a component whose terms are too large for
the type (:func:`too_narrow`) leaves the product and is computed by Cholesky factor around its own mean. So are all where
few components would share the products.

Shapes: C components, F features, B samples of a block, P = 1 + F + F (F + 1) / 2 natural statistics (full).
Source: Wainwright and Jordan 2008, Graphical Models, Exponential Families, ex. 3.3 (the Gaussian in natural form).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.core.gaussian import LOG_2PI, Covariance, Gaussians
from mixtura.core.sufficient import Statistics

__all__ = ["Frame", "Pass", "block_rows", "too_narrow"]

BLOCK_BYTES = 2 << 20  # Phi and R of one block: about what a core's own cache holds
ACCELERATOR_ROWS = 1 << 16
MAX_PRODUCT_FEATURES = 128  # beyond, Phi has over 8000 rows
# Forming the products costs memory traffic that many components share; measured on a core with AVX2, one factor a
# component is quicker below about this many components a feature. Up to 16 features the products always win.
FEW_COMPONENTS, FEW_FEATURES = 0.3, 16
# Largest rounding error of a log density that the product form may make: of the order of what is tested against SciPy in
# float64, and far below what moves a responsibility in float32.
ALLOWED_ERROR = {torch.float64: 1e-9, torch.float32: 1e-3}
# Samples are held within these many spreads of the centre; squares beyond would overflow.
FARTHEST = {torch.float64: 1e100, torch.float32: 1e12}

# Logarithm of the smallest responsibility told from zero. Below it, exp and all that follows meet subnormal numbers, which
# a processor handles ten times slower; a sample in 10^34 is none.
FAINTEST = {torch.float64: -690.0, torch.float32: -80.0}


@dataclass(frozen=True)
class Frame:
    """Coordinates in which a pass computes: z = (x - centre) / scale, both of shape (F,), float64."""

    centre: Tensor
    scale: Tensor

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write z, feature-major, shape (F, B), for x of shape (B, F) of any real type."""
        # Centred in float64 even for float32 samples: their own type keeps no digit of 1e6 + 0.1.
        if out.dtype == torch.float64:
            torch.sub(x.mT, self.centre[:, None], out=out).mul_(self.scale.reciprocal()[:, None])
        else:
            out.copy_((x.mT.double() - self.centre[:, None]).mul_(self.scale.reciprocal()[:, None]))
        farthest = FARTHEST[out.dtype]
        out.clamp_(-farthest, farthest)

    @classmethod
    def of(cls, gaussians: Gaussians) -> Frame:
        """Coordinates that suit a mixture: centred on its mean, in units of its spreads."""
        mean_F, covariance_FF = gaussians.moments()
        variance_F = covariance_FF.diagonal()
        if gaussians.covariance == "spherical":
            variance_F = variance_F.mean().expand(len(variance_F))
        return cls(mean_F, variance_F.sqrt())

    def enter(self, gaussians: Gaussians) -> Gaussians:
        """A mixture of x as the mixture of z."""
        inverse = self.scale.reciprocal()
        return gaussians.mapped(inverse, -self.centre * inverse)

    def leave(self, gaussians: Gaussians) -> Gaussians:
        """A mixture of z as the mixture of x."""
        return gaussians.mapped(self.scale, self.centre)


def block_rows(n_features: int, n_components: int, covariance: Covariance, dtype: torch.dtype, device: str) -> int:
    """Samples a block: as many as keep the block's arrays in a core's cache; more on an accelerator."""
    if torch.device(device).type != "cpu":
        return ACCELERATOR_ROWS
    products = (
        1 + n_features if _by_factor(n_features, n_components, covariance) else _n_products(n_features, covariance)
    )
    rows = BLOCK_BYTES // (dtype.itemsize * (products + n_components))
    return max(512, min(4096, rows // 128 * 128))


def too_narrow(gaussians: Gaussians, dtype: torch.dtype) -> Tensor:
    """Which components the product form would compute with too large an error, shape (C,), for samples of unit spread.

    The error of theta . phi is about the unit roundoff times the norm of its terms.
    """
    upper = gaussians.precisions_cholesky
    if gaussians.covariance in ("full", "tied"):
        norm = (upper @ upper.mT).flatten(-2).norm(dim=-1)
        pulled_CF = (gaussians.means.unsqueeze(-2) @ upper).squeeze(-2)
        linear = (pulled_CF.unsqueeze(-2) @ upper.mT).squeeze(-2).norm(dim=-1)
    else:
        inverse = upper if gaussians.covariance == "diag" else upper[:, None].expand_as(gaussians.means)
        norm = inverse.square().norm(dim=-1)
        pulled_CF = gaussians.means * inverse
        linear = (pulled_CF * inverse).norm(dim=-1)
    terms = norm + 2 * linear + pulled_CF.square().sum(-1)
    narrow: Tensor = ~(torch.finfo(dtype).eps / 2 * terms <= ALLOWED_ERROR[dtype])
    # One ellipsoid for all: the products it shares are right for every component or for none.
    return narrow.any().expand_as(narrow) if gaussians.covariance == "tied" else narrow


class Pass:
    """Log densities, responsibilities and statistics of blocks of samples under one mixture.

    Args:
        gaussians: the mixture, in the coordinates of the frame.
        frame: coordinates to compute in; centred on the samples and scaled to their spread.
        dtype: of the block's arithmetic, float32 or float64. Sums over samples are float64 either way.
        device: where to compute.
        statistics: whether to add up statistics; a pass that only scores leaves them out.
    Attributes:
        responsibilities: of the last block, shape (C, B), times its weights; overwritten by the next block.
    Example:
        >>> mixture = Gaussians.build([0.5, 0.5], [[0.0], [4.0]], [1.0, 1.0], "spherical")
        >>> frame = Frame(torch.tensor([2.0]).double(), torch.tensor([2.0]).double())
        >>> run = Pass(frame.enter(mixture), frame)
        >>> run.add(torch.tensor([[2.0]]).double())
        tensor([-2.9189], dtype=torch.float64)
        >>> run.responsibilities
        tensor([[0.5000],
                [0.5000]], dtype=torch.float64)
    """

    def __init__(
        self,
        gaussians: Gaussians,
        frame: Frame,
        *,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        statistics: bool = True,
    ) -> None:
        self.covariance: Covariance = gaussians.covariance
        self.n_components, self.n_features = gaussians.n_components, gaussians.n_features
        self.dtype, self.wants_statistics = dtype, statistics
        self._frame = Frame(frame.centre.to(device), frame.scale.to(device))
        log_det = frame.scale.log().sum()
        narrow_C = too_narrow(gaussians, dtype)
        if _by_factor(self.n_features, self.n_components, self.covariance):
            narrow_C = torch.ones_like(narrow_C)
        self._apart = narrow_C.nonzero()[:, 0].tolist()
        self._together = len(self._apart) < self.n_components
        self._theta_CP = natural_parameters(gaussians, log_det).to(device=device, dtype=dtype)
        self._theta_CP[narrow_C.to(device)] = 0.0  # what does not fit the type must not spread from there
        self._inside = gaussians.to(device=device, dtype=dtype)
        self._shift_C = (
            gaussians.log_weights + _half_log_det(gaussians) - log_det - 0.5 * self.n_features * LOG_2PI
        ).tolist()
        self._n_products = _n_products(self.n_features, self.covariance) if self._together else 1 + self.n_features
        # Above Phi, as many rows hold x once more: see _expand.
        self._phi_PB = torch.empty(self.n_features + self._n_products, 0, dtype=dtype, device=device)
        self._joint_CB = torch.empty(0, 0, dtype=dtype, device=device)
        self._work_FB = [torch.empty(0, 0, dtype=dtype, device=device) for _ in range(2)]
        shape = (self.n_components, self._n_products)
        self._sums_CP = torch.zeros(shape, dtype=torch.float64, device=device)
        f = self.n_features
        wide = {"full": (f, f), "tied": (), "diag": (f,), "spherical": ()}[self.covariance]
        self._first_AF = torch.zeros(len(self._apart), f, dtype=torch.float64, device=device)
        self._second_A = torch.zeros(len(self._apart), *wide, dtype=torch.float64, device=device)
        self._scatter_FF = torch.zeros(f, f, dtype=torch.float64, device=device)
        self._log_likelihood = torch.zeros((), dtype=torch.float64, device=device)
        self.responsibilities = self._joint_CB

    def add(self, x: Tensor, *, weights: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
        """Take in a block.

        Args:
            x: shape (B, F), finite, any real type, on the pass's device.
            weights: of the samples, shape (B,), >= 0.
            allowed: which components each sample may come from, shape (B, C), boolean, at least one in every row.
        Returns:
            Log density of each sample, over the components it may come from; shape (B,), float64, in the units of x.
        """
        z_FB, joint_CB = self._expand(x)
        self._log_joint(joint_CB, len(x))
        if allowed is not None:
            joint_CB.masked_fill_(~allowed.mT, -torch.inf)
        top_B = joint_CB.amax(0)
        joint_CB.sub_(top_B).clamp_(min=FAINTEST[self.dtype]).exp_()
        if allowed is not None:
            joint_CB.masked_fill_(~allowed.mT, 0.0)
        mass_B = joint_CB.sum(0)
        log_likelihood_B = top_B.double() + mass_B.double().log()
        share_B = mass_B.reciprocal_()
        if weights is not None:
            share_B.mul_(weights)
        joint_CB.mul_(share_B)
        self.responsibilities = joint_CB
        if self.wants_statistics:
            self._sum(z_FB, joint_CB)
            total = log_likelihood_B.sum() if weights is None else log_likelihood_B @ weights.double()
            self._log_likelihood += total
        return log_likelihood_B

    def statistics(self) -> Statistics:
        """The statistics of all blocks so far, in the coordinates of the frame, float64."""
        f = self.n_features
        weight_C, first_CF = self._sums_CP[:, f].clone(), self._sums_CP[:, :f].clone()
        second = self._unpack()
        for a, c in enumerate(self._apart):
            # Around the component's own mean so far; moving the origin is exact enough in float64.
            mean_F, w = self._inside.means[c].double(), weight_C[c]
            first_CF[c] = self._first_AF[a] + w * mean_F
            if self.covariance == "full":
                cross_FF = torch.outer(self._first_AF[a], mean_F)
                second[c] = self._second_A[a] + cross_FF + cross_FF.mT + w * torch.outer(mean_F, mean_F)
            elif self.covariance == "diag":
                second[c] = self._second_A[a] + 2 * self._first_AF[a] * mean_F + w * mean_F.square()
            elif self.covariance == "spherical":
                second[c] = self._second_A[a] + 2 * self._first_AF[a] @ mean_F + w * mean_F.square().sum()
        return Statistics(*(part.cpu() for part in (weight_C, first_CF, second, self._log_likelihood)))

    def _expand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Phi of a block into the buffer; views of the samples in it, (F, B), and of the log joints to be, (C, B)."""
        n, f = len(x), self.n_features
        if n > self._phi_PB.shape[1]:
            self._phi_PB = self._phi_PB.new_empty(len(self._phi_PB), n)
            self._phi_PB[2 * f] = 1.0
            self._joint_CB = self._joint_CB.new_empty(self.n_components, n)
            if self._apart:
                self._work_FB = [self._phi_PB.new_empty(f, n) for _ in range(2)]
        z_FB = self._phi_PB[f : 2 * f, :n]
        self._frame.into(x, z_FB)
        rest_PB = self._phi_PB[2 * f + 1 :, :n]
        if not self._together or self.covariance == "tied":
            pass
        elif self.covariance == "full":
            # x times x turned by s places, for s up to half a turn, gives every product once, in runs of F rows. With x
            # twice in a row, a turn is a shifted view. Row by row of a triangle would be twice as many calls.
            self._phi_PB[:f, :n] = z_FB
            row = 0
            for s, rows in enumerate(_turns(f)):
                turned_FB = self._phi_PB[s : s + rows, :n]
                torch.mul(self._phi_PB[:rows, :n], turned_FB, out=rest_PB[row : row + rows])
                row += rows
        elif self.covariance == "diag":
            torch.mul(z_FB, z_FB, out=rest_PB)
        else:
            torch.sum(z_FB.square(), 0, keepdim=True, out=rest_PB)
        return z_FB, self._joint_CB[:, :n]

    def _log_joint(self, joint_CB: Tensor, n: int) -> None:
        f = self.n_features
        z_FB = self._phi_PB[f : 2 * f, :n]
        upper = self._inside.precisions_cholesky
        if self._together:
            torch.mm(self._theta_CP, self._phi_PB[f:, :n], out=joint_CB)
            if self.covariance == "tied":
                joint_CB.sub_(torch.mm(upper.mT, z_FB).square_().sum(0).mul_(0.5))
        # Two buffers for all components: fresh memory for each would cost as much as the arithmetic on it.
        apart_FB, y_FB = self._work_FB[0][:, :n], self._work_FB[1][:, :n]
        for c in self._apart:
            torch.sub(z_FB, self._inside.means[c][:, None], out=apart_FB)
            if self.covariance in ("full", "tied"):
                torch.mm((upper[c] if self.covariance == "full" else upper).mT, apart_FB, out=y_FB)
            else:
                torch.mul(apart_FB, upper[c][:, None] if self.covariance == "diag" else upper[c], out=y_FB)
            torch.sum(y_FB.square_(), 0, out=joint_CB[c]).mul_(-0.5).add_(self._shift_C[c])

    def _sum(self, z_FB: Tensor, r_CB: Tensor) -> None:
        self._sums_CP += r_CB @ self._phi_PB[self.n_features :, : z_FB.shape[1]].mT
        if self.covariance == "tied":
            wide_FB = z_FB.double()
            self._scatter_FF += (wide_FB * r_CB.sum(0)) @ wide_FB.mT
            if self._apart:
                self._first_AF += r_CB.double() @ wide_FB.mT - r_CB.double().sum(1, keepdim=True) * self._inside.means
            return
        n = z_FB.shape[1]
        apart_FB, scaled_FB = self._work_FB[0][:, :n], self._work_FB[1][:, :n]
        for a, c in enumerate(self._apart):
            torch.sub(z_FB, self._inside.means[c][:, None], out=apart_FB)
            self._first_AF[a] += apart_FB @ r_CB[c]
            if self.covariance == "full":
                self._second_A[a] += torch.mul(apart_FB, r_CB[c], out=scaled_FB) @ apart_FB.mT
            else:
                square_F = apart_FB.square_() @ r_CB[c]
                self._second_A[a] += square_F if self.covariance == "diag" else square_F.sum()

    def _unpack(self) -> Tensor:
        f, c = self.n_features, self.n_components
        rest_CP = self._sums_CP[:, 1 + f :]
        if self.covariance == "tied":
            return self._scatter_FF.clone()
        if not self._together:
            shape = {"full": (c, f, f), "diag": (c, f), "spherical": (c,)}[self.covariance]
            return rest_CP.new_zeros(shape)
        if self.covariance == "diag":
            return rest_CP.clone()
        if self.covariance == "spherical":
            return rest_CP[:, 0].clone()
        rows, columns = _pairs(f)
        second_CFF = rest_CP.new_empty(c, f, f)
        second_CFF[:, rows, columns] = rest_CP
        second_CFF[:, columns, rows] = rest_CP
        return second_CFF


def natural_parameters(gaussians: Gaussians, log_det: Tensor | float = 0.0) -> Tensor:
    """Theta, shape (C, P): log weight + log density is its product with phi, less ``log_det``.

    For tied the quadratic part is left out, since all components share it.
    """
    f, upper = gaussians.n_features, gaussians.precisions_cholesky
    if gaussians.covariance in ("full", "tied"):
        pulled_CF = (gaussians.means.unsqueeze(-2) @ upper).squeeze(-2)
        linear_CF = (pulled_CF.unsqueeze(-2) @ upper.mT).squeeze(-2)
    else:
        inverse = upper if gaussians.covariance == "diag" else upper[:, None].expand_as(gaussians.means)
        pulled_CF = gaussians.means * inverse
        linear_CF = pulled_CF * inverse
    constant_C = (
        gaussians.log_weights + _half_log_det(gaussians) - 0.5 * (f * LOG_2PI + pulled_CF.square().sum(-1)) - log_det
    )
    parts = [linear_CF, constant_C[:, None]]
    if gaussians.covariance == "full":
        rows, columns = _pairs(f)
        factor = torch.where(rows == columns, -0.5, -1.0).to(upper)
        parts.append((upper @ upper.mT)[:, rows, columns] * factor)
    elif gaussians.covariance == "diag":
        parts.append(-0.5 * upper.square())
    elif gaussians.covariance == "spherical":
        parts.append(-0.5 * upper.square()[:, None])
    return torch.cat(parts, 1)


def _turns(n_features: int) -> list[int]:
    """Products x_i x_(i+s) that each turn s = 0, 1, ... contributes; of an even half turn only one half is new."""
    half = n_features // 2
    last = [half] if n_features % 2 == 0 else [n_features]
    return [n_features] * half + last if n_features > 1 else [1]


def _pairs(n_features: int) -> tuple[Tensor, Tensor]:
    """The two features of each product, in the order in which Phi holds them."""
    rows = torch.cat([torch.arange(n) for n in _turns(n_features)])
    turns = torch.cat([torch.full((n,), s) for s, n in enumerate(_turns(n_features))])
    return rows, (rows + turns) % n_features


def _half_log_det(gaussians: Gaussians) -> Tensor:
    """log det of U, half that of the inverse covariance, shape (C,), or a scalar for tied."""
    upper = gaussians.precisions_cholesky
    if gaussians.covariance in ("full", "tied"):
        return upper.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return upper.log().sum(-1) if gaussians.covariance == "diag" else gaussians.n_features * upper.log()


def _by_factor(n_features: int, n_components: int, covariance: Covariance) -> bool:
    """Whether every component goes by its own Cholesky factor, because that is quicker."""
    few = n_features > FEW_FEATURES and n_components < FEW_COMPONENTS * n_features
    return covariance == "full" and (few or n_features > MAX_PRODUCT_FEATURES)


def _n_products(n_features: int, covariance: Covariance) -> int:
    f = n_features
    return 1 + f + {"full": f * (f + 1) // 2, "tied": 0, "diag": f, "spherical": 1}[covariance]
