"""Images, audio and speech synthesis. No torch."""
