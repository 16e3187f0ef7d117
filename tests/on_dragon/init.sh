#!/bin/sh
# The first process of a box or node: makes what belongs to it, says "ready", and stays.
# It ends when its starter closes the pipe, however that came about; as it is process 1 of a PID
# namespace the kernel then ends everything else in there, and the mounts go with the last of it.
# usage: init.sh SHM HOSTNAME HOSTS  (the last two may be empty: those of the machine)
set -eu

over() { # FILE: what stdin says is read there, in this namespace; nothing stays on the disk
  fresh=$(mktemp) && cat >"$fresh" && mount --bind "$fresh" "$1" && rm "$fresh"
}

mount -t tmpfs -o "size=$1" tmpfs /dev/shm
mount -t tmpfs tmpfs /var/tmp # TMPDIR: Dragon writes a file there for every node that it has seen
if [ -n "$2" ]; then
  echo "$2" >/proc/sys/kernel/hostname
  # Dragon makes a node's id of it, and two nodes need two.
  over /proc/sys/kernel/random/boot_id </proc/sys/kernel/random/uuid
fi
if [ -n "$3" ]; then
  echo "$3" | over /etc/hosts
  : | over /etc/resolv.conf # or every look-up of what is not there would wait for an answer
fi
echo ready
# Ignored, so that the kernel reaps what is handed to us; not in this shell, whose read it would end.
exec env --ignore-signal=CHLD cat >/dev/null
