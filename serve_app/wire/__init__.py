"""What is on the wire: requests, bodies, errors, usage and OpenAPI documents. Imports config and errors only."""
