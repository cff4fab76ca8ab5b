"""Has what is on the wire: requests, bodies, errors, usage, OpenAPI documents. It imports only config and errors."""
