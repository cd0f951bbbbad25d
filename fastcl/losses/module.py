"""What the loss modules share: the keyword arguments of their function, checked when they are given, and shown."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import checks

# Not None, which is refused as a temperature.
_OF_FUNCTION = object()


class LossModule(nn.Module):
    """A loss function with its keyword arguments. A subclass names the arguments and calls the function."""

    def __init__(self, function: Callable, **settings):
        super().__init__()
        self.settings = settings
        self._defaults = function.__kwdefaults__
        known = inspect.signature(checks.options).parameters
        shared = {key: value for key, value in settings.items() if key in known}
        checks.options(type(self).__name__, **shared, by_prior=self._defaults["normalize"] is None)

    def changed_settings(self) -> list[str]:
        """`key=value` of those that are not the function's defaults."""
        return [f"{key}={value!r}" for key, value in self.settings.items() if value != self._defaults[key]]

    def extra_repr(self) -> str:
        return ", ".join(self.changed_settings())


class FunctionLoss(LossModule):
    """A loss function as a module whose constructor takes the function's keyword arguments: `function` of the class,
    less those that belong to a call, `per_call`."""

    _function: Callable
    _settings: tuple[str, ...]
    # The constructor's arguments before the settings, for its signature.
    _own: tuple[inspect.Parameter, ...] = ()

    def __init_subclass__(cls, *, function: Callable | None = None, per_call: tuple[str, ...] = ()):
        super().__init_subclass__()
        if function is None:
            return
        cls._function = staticmethod(function)
        parameters = inspect.signature(function).parameters
        cls._settings = tuple(key for key in function.__kwdefaults__ if key not in per_call)
        settings = (parameters[key] for key in cls._settings)
        temperature = parameters.get("temperature")
        own = [temperature.replace(annotation="float")] if temperature else []
        cls.__signature__ = inspect.Signature([*own, *cls._own, *settings])

    def __init__(self, *arguments: object, **settings):
        name = type(self).__name__
        if arguments:
            raise TypeError(f"{name}: arguments must have names, got {arguments[0]!r}")
        for key in settings:
            if key not in self._settings:
                raise TypeError(f"{name}: keyword must be one of {', '.join(self._settings)}, got {key!r}")
        defaults = self._function.__kwdefaults__
        super().__init__(self._function, **{key: settings.get(key, defaults[key]) for key in self._settings})

    def forward(self, *inputs: Tensor, **per_call) -> Tensor:
        return self._function(*inputs, **per_call, **self.settings)


class TemperatureLoss(FunctionLoss):
    """The same with a temperature, which is a parameter with learnable_temperature=True: kept as its logarithm, so that
    no step of an optimiser makes it negative."""

    _own = (
        inspect.Parameter("learnable_temperature", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool"),
    )

    def __init__(self, temperature: float = _OF_FUNCTION, *, learnable_temperature: bool = False, **settings):
        super().__init__(**settings)
        name = type(self).__name__
        if temperature is _OF_FUNCTION:
            temperature = inspect.signature(self._function).parameters["temperature"].default
        self._temperature = checks.constant(name, "temperature", temperature, learnable=True)
        checks.flag(name, "learnable_temperature", learnable_temperature)
        self.log_temperature = None
        if learnable_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(self._temperature)))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a tensor that requires grad where it is learned."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, *inputs: Tensor, **per_call) -> Tensor:
        return super().forward(*inputs, temperature=self.temperature, **per_call)

    def extra_repr(self) -> str:
        shown = [f"temperature={torch.as_tensor(self.temperature).item():.4g}"]
        if self.log_temperature is not None:
            shown.append("learnable_temperature=True")
        return ", ".join([*shown, *self.changed_settings()])
