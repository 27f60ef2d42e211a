"""Engines that generate replies: one base, many adapters, requests side by side."""
