"""The studio: pages in a browser over a workspace of plain folders. It keeps no state of its own."""
