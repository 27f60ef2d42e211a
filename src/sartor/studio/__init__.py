"""Web pages over the artefacts of a folder: rows, jobs, base beside tuned, conversations.

Pages are written on the server (FastAPI, Jinja2) and work without JavaScript; one vendored htmx file and `studio.js`
make them live. Each page is a URL over files on disk, and each action is a command of `sartor` in a process of its
own.
"""
