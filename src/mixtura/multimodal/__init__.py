"""Text with text, images and sound."""
