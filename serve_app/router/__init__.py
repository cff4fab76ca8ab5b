"""The router is the deployment that finds a model by its name and passes requests and answers on."""
