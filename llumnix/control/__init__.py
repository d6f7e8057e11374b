"""The global scheduler as pure code: cluster view, placement, rescheduling rounds, health."""
