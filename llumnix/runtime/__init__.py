"""The outermost ring: Ray actors, the ZeroMQ bus, threads and clocks around the pure cores."""
