"""What the loss modules share: the keyword arguments of their function, checked when they are given, and shown."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from . import checks


class LossModule(nn.Module):
    """A loss function with its keyword arguments. A subclass names the arguments and calls the function."""

    def __init__(self, function: Callable, **settings):
        super().__init__()
        self.settings = settings
        self._defaults = function.__kwdefaults__
        shared = {key: settings[key] for key in ("normalize", "reduction", "grad_reduction", "exchange")}
        checks.options(type(self).__name__, **shared, by_prior=self._defaults["normalize"] is None)

    def changed_settings(self) -> list[str]:
        """`key=value` of those that are not the function's defaults."""
        return [f"{key}={value!r}" for key, value in self.settings.items() if value != self._defaults[key]]

    def extra_repr(self) -> str:
        return ", ".join(self.changed_settings())
