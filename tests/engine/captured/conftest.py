from revflow._base.torch_capture import CAN_BE_CAPTURED

collect_ignore_glob = [] if CAN_BE_CAPTURED else ["test_*.py"]
