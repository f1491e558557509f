"""What every mixture shares: gates, experts, dispatch, components, quantizers. Knows no model and no modality."""
