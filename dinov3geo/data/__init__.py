"""Scenes or image folders to chips to crops."""
