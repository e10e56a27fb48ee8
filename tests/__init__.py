"""A package, so that `tests.oracle` is this folder's and not that of a dependency that installs its own `tests`."""
