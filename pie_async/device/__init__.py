"""What an actor may know of a GPU (`protocol`), and two devices that need none (`cpu`, `sim`)."""
