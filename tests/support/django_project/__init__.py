"""A Django project, for the tests of batchq.contrib.django: only processes of their own import it."""
