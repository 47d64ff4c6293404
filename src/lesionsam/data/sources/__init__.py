"""Where images come from: ISIC archives, a folder, COCO, generated lesions."""
