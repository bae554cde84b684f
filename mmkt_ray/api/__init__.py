"""What a Python user works with; `import mmkt_ray as mm` offers it by name and loads each part when it is first
used."""
