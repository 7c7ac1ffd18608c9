"""The sandbox: Python that a model wrote runs in one confined process, and its tests in another.

`run` starts a server and hands it programs. For each of them the server forks two children: `program` runs the program
and calls its function when asked to, `tester` runs the tests, in names of its own, and asks for the calls. Arguments
and results go over pipes as plain values, so that a program can neither see what is expected of it, nor reach what
compares.

A program may compute, import the standard library and read its files. It gets an empty environment and a temporary
folder of its own. It may not read or write elsewhere, open a socket, start or signal a process, change the modes,
owners or times of files, or use more than its processor time, memory and disk. Its output goes nowhere.

Two guards stand behind each other: the kernel's own Landlock and seccomp (`walls`), without which nothing is run
unless the user says that it may, and an audit hook in the child's interpreter, which a determined program can deceive.
What they do not prevent: a program learns how many processors, how much memory and which kernel the machine has, and
which files are where, of which size and age, though not what is in them; it slows down what runs beside it until its
processor time is up; and the kernel may have faults. Without the kernel's walls a program that deceives the hook can
read and change whatever its user can, the other process's memory and so its own verdict included.
"""
