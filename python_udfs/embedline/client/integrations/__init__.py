"""Adapt the SQL interface to applications' libraries.

There is a module for each library. Each is an extra of the package and runs in the application, never in the server.
It calls public functions and views.
"""
