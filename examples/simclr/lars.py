"""LARS, which SimCLR trains with at large batches."""

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive SGD, as SimCLR uses it.

    For a parameter w with gradient g:  u = g + weight_decay * w;  r = trust * |w| / |u| (1 where a norm is 0);
    v = momentum * v + lr * r * u;  w = w - v.  Groups with adapt=False take r = 1.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001, adapt=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, adapt=adapt))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight, group):
        update = weight.grad.add(weight, alpha=group["weight_decay"])
        if group["adapt"]:
            weight_norm, update_norm = weight.norm(), update.norm()
            ratio = group["trust"] * weight_norm / update_norm
            update = update * torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        # The learning rate goes into the velocity, so that a change of it acts on new gradients alone.
        velocity = state["velocity"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
        weight.sub_(velocity)
