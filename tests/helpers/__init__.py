# SPDX-License-Identifier: Apache-2.0
"""What tests share. Nothing here is a test, and no module imports a test."""
