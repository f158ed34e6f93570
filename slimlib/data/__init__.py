"""Pictures to train and test on: PocketScenes, ImageNet, and what is cached of them."""
