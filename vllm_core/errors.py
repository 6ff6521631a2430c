"""Every error that the engine raises on purpose.

Knows: names and their meaning. Does not know: who raises them.

    VllmCoreError
    ├── InvalidArgument      the caller asked for what cannot be (also a ValueError)
    ├── NotSupported         the device, backend or model cannot do what was asked
    ├── ModelError           a model, its weights, config or tokenizer cannot be found or read
    │   └── WeightError      a weight is missing, unused, truncated or has another shape
    ├── CapacityError        the request can never fit: context too long, KV cache too small
    ├── OutOfMemory          recoverable; from alloc, load and compile only
    ├── DeviceLost           fatal for the runtime
    ├── Timeout              a device or peer did not answer in the declared time
    ├── PeerLost             another process of the group died
    ├── BackendError         a plug-in is broken, missing or speaks another version of the seam
    └── RequestFailed        one request failed (NaN logits, engine stopped); the others go on

A message says what was wanted, what came, and what to change.
"""

from __future__ import annotations


class VllmCoreError(Exception):
    """Base of every error raised on purpose."""


class InvalidArgument(VllmCoreError, ValueError):
    """The caller asked for something contradictory or out of range."""


class NotSupported(VllmCoreError):
    """The device, backend or model cannot do what was asked."""


class ModelError(VllmCoreError):
    """A model, its weights, config or tokenizer cannot be found or read."""


class WeightError(ModelError):
    """A weight is missing, unused, truncated or has another shape than the model needs."""


class CapacityError(VllmCoreError):
    """The request can never fit into the context or the KV cache."""


class OutOfMemory(VllmCoreError):
    """The device has no memory left; recoverable from alloc, load and compile only."""


class DeviceLost(VllmCoreError):
    """The device is gone; the runtime cannot go on."""


class Timeout(VllmCoreError):
    """A device or peer did not answer in the declared time."""


class PeerLost(VllmCoreError):
    """Another process of the device group died."""


class BackendError(VllmCoreError):
    """A plug-in is broken, missing, or speaks another version of the seam."""


class RequestFailed(VllmCoreError):
    """One request failed; the others go on."""
