"""The loss under examination: how it is found, made and called, what it declares, and where it runs.

`subject` the loss; `readers` what the losses of known libraries declare, `formula` what a formula of one's own
does; `devices` and `ranks` where it runs.
"""
