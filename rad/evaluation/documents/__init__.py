"""Documents of every kind of task; each module has `build(request) -> list[Concrete]`."""
