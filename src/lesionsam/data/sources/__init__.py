"""Sources of images: ISIC archives, a folder, COCO, generated lesions."""
