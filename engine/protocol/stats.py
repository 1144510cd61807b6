"""Shared definitions of statistics that ranks measure and the server exposes."""

# Upper bounds in seconds of the collectives' time histogram; an implicit +Inf follows.
TIME_BUCKETS: tuple[float, ...] = (
    5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0, 10.0,
)  # fmt: skip
