#!/bin/sh
# The first process of a box or node: makes what belongs to it, says "ready", and stays.
# It ends when its starter closes the pipe, however that came about; as it is process 1 of a PID
# namespace the kernel then ends everything else in there, and the mounts go with the last of it.
# usage: init.sh SHM HOSTNAME HOSTS FOLDER...
# HOSTNAME and HOSTS may be empty: those of the machine. The folders, of the interpreter and of the
# tests, are there also if they lie below one that is hidden.
set -eu

over() { # FILE: what stdin says is read there, in this namespace; nothing stays on the disk
  fresh=$(mktemp) && cat >"$fresh" && mount --bind "$fresh" "$1" && rm "$fresh"
}

shm=$1 hostname=$2 hosts=$3
shift 3

hide() { # FOLDER...: TMPDIR, where Dragon writes a file for every node that it has seen; not these
  if [ $# = 0 ]; then
    mount -t tmpfs tmpfs /var/tmp
    return
  fi
  folder=$1
  shift
  case $folder in
    /var/tmp/*) (
      exec 3<"$folder"
      (hide "$@")
      mkdir -p "$folder"
      mount --no-canonicalize --bind /proc/self/fd/3 "$folder"
    ) ;;
    *) hide "$@" ;;
  esac
}

mount -t tmpfs -o "size=$shm" tmpfs /dev/shm
hide "$@"
if [ -n "$hostname" ]; then
  echo "$hostname" >/proc/sys/kernel/hostname
  # Dragon makes a node's id of it, and two nodes need two.
  over /proc/sys/kernel/random/boot_id </proc/sys/kernel/random/uuid
fi
if [ -n "$hosts" ]; then
  echo "$hosts" | over /etc/hosts
  : | over /etc/resolv.conf # or every look-up of what is not there would wait for an answer
fi
echo ready
# Ignored, so that the kernel reaps what is handed to us; not in this shell, whose read it would end.
exec env --ignore-signal=CHLD cat >/dev/null
