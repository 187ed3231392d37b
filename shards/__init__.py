"""What is on disk: the clip schema, slicing with ffmpeg, writing, the manifest and reading."""
