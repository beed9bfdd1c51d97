"""Every error that simexplain raises on purpose: one sentence with what came and what to do."""


class SimexplainError(ValueError):
    """Base of all errors meant for the user; its text is complete without a traceback."""


class ComparisonError(SimexplainError):
    """The images or embeddings compared do not fit together."""


class ImageError(SimexplainError):
    """A picture cannot be read or preprocessed."""


class ModelError(SimexplainError):
    """A model, a layer of it or a file that should hold one cannot be used."""


class TwoImagesError(ModelError):
    """A model that looks at two images at once was given where one image is embedded."""


class OutputError(SimexplainError):
    """A result cannot be written or read back."""


DAMAGED = (ValueError, KeyError, IndexError, TypeError, AttributeError)
"""What reading a file of the right kind but with damaged content may raise."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
