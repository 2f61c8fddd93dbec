"""What makes the published figures; a package, since pyarrow 17 installs one of this name."""
