"""Files, images, processes, progress and devices. Import the module you need."""
