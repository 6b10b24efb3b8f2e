"""A lab to try the whole method in minutes on a CPU: a task that needs reasoning, and a hybrid that learned it.

- [`~hf_elastic.lab.book`]: the task, its data and its score.
- [`~hf_elastic.lab.parent`]: the parent model, as shipped and as trained.
"""
