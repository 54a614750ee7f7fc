"""What will be touched next: integer keys in, integer keys out."""

from prefetch.plan import Plan, Ticket

__all__ = ["Plan", "Ticket"]
