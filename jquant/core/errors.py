"""The errors and warnings users meet. Each message says where (path or file), what is wrong, and what to do."""


class JQuantError(ValueError):
    """Base of every error that jquant raises for a user's input."""


class FormatError(JQuantError):
    """A number format that does not exist, or does not fit what it is asked to hold."""


class RecipeError(JQuantError):
    """A recipe that matches nothing, or asks for what can't be done at a site."""


class TraceError(JQuantError):
    """A function that can't be traced with the arguments given, or read as the caller asked."""


class NonFiniteError(JQuantError):
    """NaN or infinity in weights or activations; the message names the site and the count."""


class KernelError(JQuantError):
    """A product that is to run in a kernel, for which there is none; the message says where and why."""


class CacheError(JQuantError):
    """A key/value cache that is full, or asked for what its sizes do not allow."""


class CheckpointError(JQuantError):
    """A folder or file that can't be read, or must not be overwritten."""


class DamagedQTensorError(JQuantError, TypeError):
    """The arrays of a QTensor are not what its format says (codes mapped to floats, sliced along a packed axis)."""


class JQuantWarning(UserWarning):
    """Something was handled by rule (a dead input channel, a singular Gram matrix); the message names the site."""
