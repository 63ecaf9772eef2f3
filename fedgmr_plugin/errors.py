"""Every error that fedgmr raises on purpose, with a stable code.

    FedGMRError
    |-- ConfigError        GMR-1xx   a key or value of the YAML is wrong
    |-- ModelError         GMR-2xx   the model, or a file of it, cannot be used
    |-- DataError          GMR-3xx   a client's data cannot be used
    |-- UpdateRejected     GMR-4xx   an upload was refused; the global model is untouched
    |-- HostError          GMR-5xx   FedML, Python or the machine is not as needed
    |-- RunLogError        GMR-6xx   a run log or run directory cannot be read
    `-- WireError          GMR-7xx   a message between server and client cannot be trusted

A message reads ``GMR-104 density_min=1.3 is outside (0, 1]``, then where the value came from,
then what to do. ``fedgmr explain GMR-104`` prints the catalogue's entry.
"""

from __future__ import annotations

from typing import NamedTuple


class CatalogueEntry(NamedTuple):
    """What a code means, for ``fedgmr explain`` and ``docs/errors.md``."""

    title: str
    meaning: str
    remedy: str


CATALOGUE: dict[str, CatalogueEntry] = {
    "GMR-100": CatalogueEntry(
        "configuration refused",
        "One or more keys of the configuration are wrong; every problem found is listed.",
        "Repair each listed key. `fedgmr schema` prints the allowed keys and ranges.",
    ),
    "GMR-101": CatalogueEntry(
        "unknown key",
        "`fedgmr_args`, or the file of an experiment, has a key that fedgmr does not know. It is refused "
        "rather than ignored.",
        "Use the suggested spelling, or delete the key.",
    ),
    "GMR-102": CatalogueEntry(
        "wrong type",
        "The value has another type than the key takes (text instead of a number, say).",
        "Write the value in the type that the message names.",
    ),
    "GMR-103": CatalogueEntry(
        "unknown choice",
        "The key takes one of a fixed list of words.",
        "Use one of the words that the message lists.",
    ),
    "GMR-104": CatalogueEntry(
        "value out of range",
        "A number lies outside its allowed range, or is not finite.",
        "Choose a value in the range that the message gives.",
    ),
    "GMR-105": CatalogueEntry(
        "density ladder not increasing",
        "`density_ladder` must be strictly increasing, within (0, 1], and end at 1.",
        "Write for example `density_ladder: [0.05, 0.1, 0.2, 0.5, 1.0]`.",
    ),
    "GMR-106": CatalogueEntry(
        "options contradict each other",
        "Two keys cannot be combined (a trigger that needs a validation split without one, say).",
        "Change one of the keys that the message names.",
    ),
    "GMR-107": CatalogueEntry(
        "missing key",
        "FedML, or an experiment, needs a key that the YAML does not have.",
        "Add the key that the message names.",
    ),
    "GMR-108": CatalogueEntry(
        "configuration file missing or unreadable",
        "The YAML file does not exist or is not valid YAML. FedML itself would ignore this silently.",
        "Check the path given with --cf, and the line that the YAML parser names.",
    ),
    "GMR-109": CatalogueEntry(
        "list does not fit the clients",
        "`densities` and `compute_slowdown` must have one value per client (`client_num_in_total`).",
        "Give one value per client; instead of `densities`, `heterogeneity` fits any number.",
    ),
    "GMR-110": CatalogueEntry(
        "run directory cannot be used",
        "The run's directory cannot be made, or already holds a finished or interrupted run, which is never "
        "overwritten.",
        "Choose another `run_name`, leave it out to number runs, or name an `output_dir` to write to.",
    ),
    "GMR-111": CatalogueEntry(
        "device keys missing",
        "Devices are authenticated, and the file of their keys is not given, cannot be read, lacks a device, "
        "or gives two devices the same key.",
        'Make one with `fedgmr keys`, name it in `device_keys`, or say `device_authentication: "off"` where '
        "nobody but the devices can reach the broker.",
    ),
    "GMR-112": CatalogueEntry(
        "connection not configured",
        "The keys that name the broker and the object store are missing or wrong.",
        "See docs/devices.md for `customized_training_mqtt_config` and `customized_training_s3_config`.",
    ),
    "GMR-113": CatalogueEntry(
        "script without its functions",
        "The script of a run with devices does not define what a device or a replay needs; or the `problem` "
        "of an experiment names a function that is not there.",
        "Define make_model(args), train_data(args, client) and test_data(args); see docs/devices.md.",
    ),
    "GMR-201": CatalogueEntry(
        "no prunable weights",
        "No convolution, linear or embedding weight is left to prune, so every sub-model is the model.",
        "Use a model with a hidden layer of one of these kinds (the last linear layer is never pruned, and "
        "recurrent layers are not supported), shorten `dense_layers`, or choose FedAvg.",
    ),
    "GMR-202": CatalogueEntry(
        "mixed or unsupported parameter types",
        "Parameters must share one floating-point type (float32 or float64).",
        "Convert the model, for example `model.float()`.",
    ),
    "GMR-203": CatalogueEntry(
        "parameters shared between layers",
        "One tensor is registered under several names (tied weights). It is kept once, and kept dense "
        "where one of its uses must be dense.",
        "Nothing to do; this is a note.",
    ),
    "GMR-204": CatalogueEntry(
        "lazy or empty parameter",
        "A parameter has no shape yet (lazy module) or no elements.",
        "Run one batch through the model before handing it to FedML.",
    ),
    "GMR-205": CatalogueEntry(
        "integer buffers",
        "Integer buffers (such as num_batches_tracked) are never averaged; the server's value stays.",
        "Nothing to do; this is a note.",
    ),
    "GMR-206": CatalogueEntry(
        "batch normalisation",
        "Running statistics are averaged over the arriving clients (replacement form, never deltas).",
        "Nothing to do; group or layer normalisation is often better on non-IID clients.",
    ),
    "GMR-207": CatalogueEntry(
        "model without widths",
        "Smaller models are cut from Conv2d and Linear layers with pointwise layers, pooling, additions, "
        "Flatten and norms of single channels without running statistics between them; the model has "
        "something else.",
        "Rewrite what the message names, or use masks instead of widths.",
    ),
    "GMR-208": CatalogueEntry(
        "model file damaged",
        "A device's model file (.mnn) is too large, cut short, or not such a file. Nothing of it was used.",
        "Send it again; if it repeats, look for a size limit of the storage or the transport.",
    ),
    "GMR-209": CatalogueEntry(
        "model file of another model",
        "A device's model file (.mnn) has other parameters than the model that it is to be loaded into.",
        "Give server and devices the same model; a device must return the file that it got, trained.",
    ),
    "GMR-210": CatalogueEntry(
        "layer that does not translate",
        "A layer of the model has no counterpart in a device's model file (.mnn), or the other way round.",
        "Use the layers that the message lists.",
    ),
    "GMR-211": CatalogueEntry(
        "model that cannot be stacked",
        "`batch_clients` trains several clients at once. Models that are no plain stack of common layers go "
        "through torch.func.vmap for it, which does not know something that this model does (recurrent "
        "layers, decisions that depend on values).",
        "Leave `batch_clients` out: clients then train one after another.",
    ),
    "GMR-212": CatalogueEntry(
        "state that is no tensor",
        "The model's state dictionary has entries that are no tensors (`get_extra_state`), which are neither "
        "merged nor stored.",
        "Keep such state out of the model, or in a buffer.",
    ),
    "GMR-213": CatalogueEntry(
        "model not finite",
        "A parameter or a buffer holds NaN or infinity (an attention mask, say, or a parameter that nothing "
        "initialised). Buffers travel and are averaged as parameters are, so every upload would be refused.",
        "Initialise the parameter; register a constant with `persistent=False`, which keeps it out of the "
        "model's state.",
    ),
    "GMR-214": CatalogueEntry(
        "sub-model without a parameter",
        "A density leaves not one of the model's prunable weights, and no parameter of the model is never "
        "pruned: clients of that density would have nothing to train.",
        "Use larger densities (`densities`, `density_min`) or a larger model, or name a layer in "
        "`dense_layers`.",
    ),
    "GMR-301": CatalogueEntry(
        "client without training data",
        "A client has no training sample (or none is left after the validation split).",
        "Give every client data, lower `client_num_in_total`, or lower `validation_fraction`.",
    ),
    "GMR-302": CatalogueEntry(
        "dataset not understood",
        "The dataset is not FedML's 8-element list with loaders or batches per client.",
        "See docs/configuration.md, section data, for the accepted forms.",
    ),
    "GMR-303": CatalogueEntry(
        "bandwidth traces not usable",
        "The .npz file of `bandwidth_traces` is missing or lacks the arrays time_s, mbit_s and offset.",
        "See docs/configuration.md, section bandwidth traces, for the format.",
    ),
    "GMR-304": CatalogueEntry(
        "error in a training step",
        "The model, or the built-in trainer's loss, raised an error on a batch of a client.",
        "The message has the error. If it is about shapes, types or labels, compare those of the batch with "
        "what the model takes and gives: scores [samples, classes, ...] for labels 0 to classes - 1.",
    ),
    "GMR-305": CatalogueEntry(
        "metric that nobody gives",
        "The plateau trigger watches a metric that the trainer's `test` does not return, or not as a finite "
        "number, on the validation data: no client would ever be restored.",
        "Let `test` return it (test_correct and test_total, or test_loss), or set `trigger_metric` to "
        "the one that it does return.",
    ),
    "GMR-401": CatalogueEntry(
        "unknown or repeated dispatch",
        "An upload names a dispatch that is not in flight: it was applied, dropped or never made.",
        "Nothing to do; the upload is counted and ignored.",
    ),
    "GMR-402": CatalogueEntry(
        "wrong shape",
        "An upload does not have one value for each coordinate of the dispatched sub-model.",
        "Check the client; the upload is counted and ignored.",
    ),
    "GMR-403": CatalogueEntry(
        "not finite",
        "An upload holds NaN, infinity, or values so large that their squares overflow; or the merge of a "
        "window is not finite, or too large for `payload_dtype`.",
        "Lower the learning rate or clip gradients; the upload is counted and ignored.",
    ),
    "GMR-404": CatalogueEntry(
        "wrong sample count",
        "An upload claims zero, negative, non-finite or more than 2^53 samples.",
        "Check the client: a ClientTrainer has to iterate over the batches that it is given, which are "
        "counted. The upload is counted and ignored.",
    ),
    "GMR-405": CatalogueEntry(
        "event out of order",
        "The engine was given an event that its phase does not allow. This is a bug of the runtime.",
        "Please report it with the run log.",
    ),
    "GMR-406": CatalogueEntry(
        "wrong client",
        "An upload names a dispatch that was made to another client.",
        "Check the client; the upload is counted and ignored.",
    ),
    "GMR-407": CatalogueEntry(
        "too stale",
        "An upload answers a dispatch that is more than `staleness_limit` windows old.",
        "Raise `staleness_limit`, or leave it out: late work then counts by its staleness weight.",
    ),
    "GMR-408": CatalogueEntry(
        "too few updates for the defence",
        "A window closed with fewer updates than FedML's defence compares, or not with one of every client "
        "where it remembers them by their place: clients left, or did not answer in time. None is merged.",
        "Raise `answer_deadline`, leave `window_limit` out, or choose `norm_bound` and `trim`, which take "
        "any number.",
    ),
    "GMR-501": CatalogueEntry(
        "unsupported FedML version",
        "fedgmr wraps FedML's internals and is tested with 0.9.6 only.",
        "pip install fedml==0.9.6",
    ),
    "GMR-502": CatalogueEntry(
        "runtime not supported",
        "`federated_optimizer: fedgmr` does not run under this training_type and backend.",
        'Use `training_type: "simulation"` with `backend: "sp"`, "MPI" or "NCCL", "cross_device" with '
        '"MQTT_S3_MNN", or "cross_silo" with "MQTT_S3" or "GRPC".',
    ),
    "GMR-503": CatalogueEntry(
        "defence needs more updates",
        "FedML's multi-client defences need at least three updates per aggregation.",
        "Set `min_updates: 3` or more in fedgmr_args, and `client_num_per_round`, or disable the defence.",
    ),
    "GMR-504": CatalogueEntry(
        "homomorphic encryption not supported",
        "Encrypted updates cannot be normalised per coordinate by the server.",
        "Set `enable_fhe: false`.",
    ),
    "GMR-505": CatalogueEntry(
        "FedML cannot be imported",
        "A dependency of FedML is missing or incompatible.",
        "Run `fedgmr doctor`; it prints the line that repairs each finding.",
    ),
    "GMR-506": CatalogueEntry(
        "client trainer failed",
        "The user's ClientTrainer raised, or returned weights that do not fit the model.",
        "Read the cause above; the trainer also has to run under FedML's own FedAvg.",
    ),
    "GMR-507": CatalogueEntry(
        "worker process failed",
        "A process that trains clients (one of `workers`, or a rank) raised an error, or is gone, perhaps "
        "because the kernel ended it for want of memory. The run stops; its log and its checkpoints stay.",
        "The message has the error or the exit code, and the traceback stands above it. Repair the cause and "
        "continue with `fedgmr resume`.",
    ),
    "GMR-508": CatalogueEntry(
        "not started by a launcher",
        '`backend: "MPI"` and `backend: "NCCL"` start with mpirun and torchrun, as several processes.',
        'Use the command that the message has, or `backend: "sp"` for one process.',
    ),
    "GMR-509": CatalogueEntry(
        "MPI missing",
        "mpi4py, or the MPI library that it loads, is missing or cannot be used.",
        'Run `pip install "fedgmr[mpi]"`, and on Debian `sudo apt-get install openmpi-bin libopenmpi-dev`.',
    ),
    "GMR-510": CatalogueEntry(
        "ranks do not fit",
        "There are more ranks than clients, or the ranks of a job have another model, other data, another "
        "configuration or other versions than rank 0.",
        "Start every rank with the same script, arguments, data and environment, and no more than clients.",
    ),
    "GMR-511": CatalogueEntry(
        "MNN missing",
        "Model files for devices (.mnn) are written by the package MNN, which is missing or cannot be used.",
        'Run `pip install "fedgmr[device]"`.',
    ),
    "GMR-512": CatalogueEntry(
        "MQTT broker missing",
        "Mosquitto, which a local stack starts, is not installed, ends at once or does not answer.",
        "Install it: on Debian `sudo apt-get install mosquitto`, on macOS `brew install mosquitto`; if it is "
        "installed, read the log that the message names.",
    ),
    "GMR-513": CatalogueEntry(
        "object storage missing",
        "moto's S3 server, which a local stack starts, is not installed, ends at once or does not answer.",
        'Run `pip install "fedgmr[local]"`; if it is installed, read the log that the message names.',
    ),
    "GMR-514": CatalogueEntry(
        "local process in the wrong state",
        "A process of a local stack cannot be started, runs already or does not run; or the record of the "
        "processes in its folder is damaged.",
        "Read the process's log, stop what still runs in the folder, or use another folder.",
    ),
    "GMR-515": CatalogueEntry(
        "broker or store refuses",
        "The MQTT broker or the object store was reached and refuses: a wrong password, no such bucket, TLS.",
        "Check the keys of `customized_training_mqtt_config` and `customized_training_s3_config`.",
    ),
    "GMR-516": CatalogueEntry(
        "gRPC missing",
        "FedML's backend GRPC needs the package grpcio, which is missing or cannot be used.",
        'Run `pip install "fedgmr[grpc]"`.',
    ),
    "GMR-517": CatalogueEntry(
        "run served twice",
        "Another process serves the run of this `run_id` and `server_id` at the same broker, or over gRPC "
        "listens at this one's address. Two servers would give the same devices contradictory tasks.",
        "Stop the other process, or give this run a `run_id` (over gRPC, a port) of its own. A server that "
        "was killed does not count: `fedgmr resume` continues its run at once.",
    ),
    "GMR-518": CatalogueEntry(
        "server gone",
        "A device has heard nothing of its server for `server_patience` seconds: the run is over, or nobody "
        "went on with it.",
        "Look at the server. If it is running, start the device again, with a longer `server_patience` if "
        "the server may be silent for so long.",
    ),
    "GMR-601": CatalogueEntry(
        "run log not found",
        "The path is neither a run directory with `run.jsonl` nor a log file.",
        "Give the directory that the run printed at its end.",
    ),
    "GMR-602": CatalogueEntry(
        "run log damaged",
        "A line before the last one is not valid JSON, or the header is missing.",
        "Check that the file is a run's `run.jsonl`, and copy it again; only its last line may be torn.",
    ),
    "GMR-603": CatalogueEntry(
        "run log of another schema",
        "The log was written with a schema version that this release does not read.",
        "Read it with the release named in its header.",
    ),
    "GMR-604": CatalogueEntry(
        "run cannot be resumed",
        "The run is finished, is being trained, or was not the first run of a Python script.",
        "Start it again, with another `run_name` or without one.",
    ),
    "GMR-605": CatalogueEntry(
        "checkpoints damaged",
        "Every checkpoint of the run is damaged, of another format or not of this run's log.",
        "Start the script again; what the run log holds stays.",
    ),
    "GMR-606": CatalogueEntry(
        "another run than the one to resume",
        "The script does not describe the run that it is to continue: options, seed, layers, numbers of "
        "samples, the order of the devices, or the names that these know the run by differ.",
        "Undo the changes that the message names, or start a new run.",
    ),
    "GMR-607": CatalogueEntry(
        "journal damaged",
        "An event that a run with real devices had written down was changed on the disk afterwards, or is "
        "gone.",
        "Check the disk. To go on from the last checkpoint alone, move the folder `journal` away.",
    ),
    "GMR-608": CatalogueEntry(
        "run cannot be replayed",
        "The run is a simulation, or one with FedML's own clients; or what it was started with is not there "
        "any more.",
        "Replay on the machine of the server, with the script and the configuration where they were.",
    ),
    "GMR-701": CatalogueEntry(
        "message cut short",
        "A message has fewer bytes than its own header claims, or not even a header.",
        "Send it again; if it repeats, look for a size limit of the transport.",
    ),
    "GMR-702": CatalogueEntry(
        "header too long",
        "A message claims a header longer than 64 KiB. Nothing was read or allocated.",
        "The sender is not fedgmr, or bytes were lost before the message; check the transport's framing.",
    ),
    "GMR-703": CatalogueEntry(
        "header not JSON",
        "The header is not valid UTF-8 or JSON, repeats a key, nests too deep, or holds a number "
        "that no header has.",
        "The message was damaged or not made by fedgmr; send it again.",
    ),
    "GMR-704": CatalogueEntry(
        "header not canonical",
        "The header means something but is not spelled as the format demands, so that equal "
        "messages might have different bytes.",
        "Encode with fedgmr, or follow docs/wire-format.md to the byte.",
    ),
    "GMR-705": CatalogueEntry(
        "header field missing or unknown",
        "A message of this kind lacks a field or tensor, or has one that the format does not know.",
        "Run the same release of fedgmr on both sides.",
    ),
    "GMR-706": CatalogueEntry(
        "wire format of another version",
        "The message is of a version of the wire format that this release does not read.",
        "Run the same release of fedgmr on both sides.",
    ),
    "GMR-707": CatalogueEntry(
        "header field out of range",
        "A field of the header has a value that it cannot have (a negative number, say).",
        "The message was damaged or not made by fedgmr; send it again.",
    ),
    "GMR-708": CatalogueEntry(
        "value type not accepted",
        "Values are of a type that the format does not have or the receiver did not ask for.",
        "Use the model's own type, or accept bfloat16 or float16 on both sides (`payload_dtype`).",
    ),
    "GMR-709": CatalogueEntry(
        "tensors contradict each other",
        "Shape, type and place of a tensor do not agree, or tensors overlap or leave holes.",
        "The message was damaged or not made by fedgmr; send it again.",
    ),
    "GMR-710": CatalogueEntry(
        "bytes after the message",
        "A message has more bytes than its header accounts for.",
        "Check the transport's framing: one buffer holds one message.",
    ),
    "GMR-711": CatalogueEntry(
        "model of another size",
        "The sender's model has another number of coordinates than the receiver's.",
        "Build the same model on both sides.",
    ),
    "GMR-712": CatalogueEntry(
        "slice outside the model",
        "The slice of the payload that a message claims does not fit the model, or its segments "
        "do not fit the slice.",
        "The message was damaged or not made by fedgmr; send it again.",
    ),
    "GMR-713": CatalogueEntry(
        "message of another run",
        "The message belongs to another run than the receiver's.",
        "Stop the processes of the other run, or give the runs their own topics or ports.",
    ),
    "GMR-714": CatalogueEntry(
        "kind of message not expected",
        "The receiver does not take this kind of message: a client takes no update, a server nothing else.",
        "Check which side the message was sent to.",
    ),
    "GMR-715": CatalogueEntry(
        "mask not known",
        "The message names its mask by a digest that the receiver does not have, or has with "
        "another payload order.",
        "Ask the server to send the mask along.",
    ),
    "GMR-716": CatalogueEntry(
        "mask of wrong length",
        "The mask's bytes end too early, or bytes are left over behind it.",
        "The message was damaged or not made by fedgmr; send it again.",
    ),
    "GMR-717": CatalogueEntry(
        "mask code unknown",
        "A chunk of the mask is packed by a code, or with a parameter, that the format does not have.",
        "Run the same release of fedgmr on both sides.",
    ),
    "GMR-718": CatalogueEntry(
        "mask does not inflate",
        "A compressed chunk of the mask is no zlib stream, or inflates to another size than its "
        "chunk has. Inflating stops there.",
        "The message was damaged or not made by fedgmr; send it again.",
    ),
    "GMR-719": CatalogueEntry(
        "mask of wrong count",
        "A mask holds another number of coordinates than was claimed, in a chunk or as a whole.",
        "The message was damaged or not made by fedgmr; send it again.",
    ),
    "GMR-720": CatalogueEntry(
        "mask not canonical",
        "A position lies outside its chunk of the mask, or bits that must be zero are not.",
        "The message was damaged or not made by fedgmr; send it again.",
    ),
    "GMR-721": CatalogueEntry(
        "values not finite",
        "A message holds NaN or infinity, and the receiver asked for finite values.",
        "Lower the learning rate or clip gradients.",
    ),
    "GMR-722": CatalogueEntry(
        "value does not fit",
        "A finite value overflows the narrower type that it was to be sent in.",
        "Send in bfloat16 or the model's own type, or lower the learning rate.",
    ),
    "GMR-723": CatalogueEntry(
        "increment out of order",
        "An increment starts beyond what the receiver holds, so coordinates would be missing in between.",
        "Apply increments in order; ask for those that were lost.",
    ),
    "GMR-724": CatalogueEntry(
        "pickle damaged",
        "A pickle of a FedML client ends too early, goes on behind its end, or its opcodes do not fit "
        "together.",
        "Send it again; if it repeats, look for a size limit of the transport.",
    ),
    "GMR-725": CatalogueEntry(
        "pickle opcode not allowed",
        "A pickle of a FedML client uses an opcode that none of FedML's messages needs, or is not of "
        "protocol 2 to 5. Nothing of it was run.",
        "Let the client send plain values and a state dict of tensors, as FedML's own clients do. If it "
        "does, somebody else sent this.",
    ),
    "GMR-726": CatalogueEntry(
        "pickle global not allowed",
        "A pickle of a FedML client names a function or class that is not on the list of those that are "
        "read. It was neither imported nor called.",
        "Let the client send plain values and a state dict of tensors, as FedML's own clients do. If it "
        "does, somebody else sent this.",
    ),
    "GMR-727": CatalogueEntry(
        "pickle too large",
        "A pickle of a FedML client has more bytes, opcodes, text or depth than the server's model needs.",
        "Build the same model on both sides. Where tensors are parts of one large storage, let the client "
        "send clones of them.",
    ),
    "GMR-728": CatalogueEntry(
        "pickled object not as FedML sends it",
        "A pickle of a FedML client puts allowed parts together in a way that FedML and torch do not, or "
        "holds a value that is neither plain nor a tensor.",
        "Let the client send plain values and a state dict of tensors, as FedML's own clients do.",
    ),
    "GMR-729": CatalogueEntry(
        "torch storage not readable",
        "The elements of a tensor are not in the format that torch writes within a pickle, are big-endian, "
        "or lie on a device that is not known.",
        "Move the client's model to the CPU before it is sent, and use torch's own pickling.",
    ),
    "GMR-730": CatalogueEntry(
        "pickled model of other names or shapes",
        "The tensors of a FedML client's model are not those of the server's: a name, a shape or a type "
        "differs.",
        "Build the same model on both sides.",
    ),
    "GMR-741": CatalogueEntry(
        "device message not understood",
        "A message of a device (or of the server to a device) is no JSON object, is too long, or has fields "
        "that are missing, unknown or of another type.",
        "Run the same release of fedgmr on both sides; see docs/device-protocol.md.",
    ),
    "GMR-742": CatalogueEntry(
        "unknown device",
        "A message came on a topic that is no device's of this run.",
        "Add the device to `client_id_list`, or stop it.",
    ),
    "GMR-743": CatalogueEntry(
        "message not authentic",
        "A message is not signed with the key of its device, or was changed on its way.",
        "Give the device the same key as the server has in `device_keys`.",
    ),
    "GMR-744": CatalogueEntry(
        "message replayed",
        "A message has a sequence number that was seen before, or is too old to tell.",
        "Nothing to do; it is counted and ignored. If it repeats, two devices share one id.",
    ),
    "GMR-745": CatalogueEntry(
        "too many messages",
        "A device sends more messages than it may.",
        "Nothing to do; what is beyond the rate is ignored. If it repeats, look at the device.",
    ),
    "GMR-746": CatalogueEntry(
        "object not as announced",
        "An object of the store is missing, longer or shorter than announced, or has another SHA-256.",
        "The device sends it again; if it repeats, look at the store and at who may write to it.",
    ),
    "GMR-747": CatalogueEntry(
        "message for somebody else",
        "A message names another device, another run, or an object of somebody else than its topic does.",
        "Stop the processes of the other run, and give every device its own id.",
    ),
    "GMR-748": CatalogueEntry(
        "device without masks",
        "A device sends FedML's plain messages to a server that talks to mask-aware devices.",
        "Use `fedgmr device`, or set `device_submodel` to `width` or `masked` for FedML's own devices.",
    ),
}


class FedGMRError(Exception):
    """Base of all errors raised on purpose.

    Args:
        code: stable code from `CATALOGUE`, such as ``"GMR-104"``.
        message: the offending ``name=value`` and what is wrong with it.
        where: where the value came from (``"fedml_config.yaml: fedgmr_args.density_min"``).
        hint: what to do next; the catalogue's remedy where it is empty.
    """

    def __init__(self, code: str, message: str, *, where: str = "", hint: str = "") -> None:
        self.code = code
        self.message = message
        self.where = where
        self.hint = hint or CATALOGUE[code].remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        first = f"{self.code} {self.message}"
        if self.where:
            first += f"\n        in {self.where}"
        return f"{first}\n        {self.hint} See docs/errors.md#{self.code.lower()}"


class ConfigError(FedGMRError):
    """A key or value of the configuration is wrong (GMR-1xx)."""


class ModelError(FedGMRError):
    """The model cannot be split into sub-models, or a file of it cannot be used (GMR-2xx)."""


class DataError(FedGMRError):
    """A client's data cannot be used (GMR-3xx)."""


class UpdateRejected(FedGMRError):
    """An upload was refused; the global model is untouched (GMR-4xx)."""


class HostError(FedGMRError):
    """FedML, Python or the machine is not as needed (GMR-5xx)."""


class RunLogError(FedGMRError):
    """A run log or run directory cannot be read (GMR-6xx)."""


class WireError(FedGMRError):
    """A message between server and client cannot be trusted (GMR-7xx); nothing of it was used."""
