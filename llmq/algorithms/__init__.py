"""Which grid point is chosen: pure functions of a weight, a grid and statistics of the inputs."""
