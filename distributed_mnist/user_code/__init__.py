"""Code that users bring: functions named `package.module:function`, such as a factory for their model.

They are found in installed packages and in the current folder.
"""
