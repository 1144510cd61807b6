"""Which errors are a mistake of the user's, and which another try may cure; and the exit codes that tell them apart."""

import errno

EXIT_FAILED = 1  # another try may go well
EXIT_USER_ERROR = 2  # it will not, until somebody changes something
EXIT_INTERRUPTED = 130  # as shells have it for SIGINT: what was asked for was not done
EXIT_UNREAD = 141  # as shells have it for SIGPIPE: what reads the output wanted no more of it

# What a disk, a network file system or a busy machine says for a while. A full disk is not among them: somebody has to
# make room.
_PASSING = (
    errno.EIO,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOLCK,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
)


class TransientError(ValueError):
    """In one line like a user's mistake, but nobody's: the same may go well later."""


def is_passing(error: OSError) -> bool:
    """Return whether another try may go well."""
    return error.errno in _PASSING


def file_error(text: str, error: OSError) -> ValueError:
    """Return an error that says `text`: transient where `error` may pass."""
    return TransientError(text) if is_passing(error) else ValueError(text)


def is_mistake(error: BaseException) -> bool:
    """Return whether the user has to change something: whoever tries again without that ends as before."""
    return isinstance(error, ValueError) and not isinstance(error, TransientError)
