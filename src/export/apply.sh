#!/bin/sh
# Brings a raw image file or a block device from one state of a disk to the next one. Needs a POSIX shell and coreutils,
# or busybox. With `fallocate` of util-linux, what became zeros is given back to the host.
#
# usage: sh apply [--force] [--marker FILE] TARGET
#
# What state a target is in stands in TARGET.afterimage, or in FILE: a line, written by this script. Another state than
# the one that this increment begins at is refused; so is overwriting what this script knows nothing of. --force does it
# all the same. Interrupted, run it again: the result is the same. A file that was written to by somebody else since is not
# taken for what the line says; while an increment is half applied, let nobody else write to it.
set -eu
LC_ALL=C
export LC_ALL
unset CDPATH
# A new image is the business of its owner.
umask 077

from=@FROM@
from_name=@FROM_NAME@
from_size=@FROM_SIZE@
to=@TO@
to_name=@TO_NAME@
to_size=@TO_SIZE@
lines=@LINES@

here=.
case $0 in
*/*) here=${0%/*} ;;
esac
case $here in
/* | '') ;;
*) here=./$here ;;
esac

force=
marker=
target=
kind=
punches=yes

die() {
    printf 'apply: %s\n' "$*" >&2
    exit 1
}

usage() {
    echo 'usage: sh apply [--force] [--marker FILE] TARGET' >&2
    exit 2
}

options() {
    while [ $# -gt 0 ]; do
        case $1 in
        --force) force=yes ;;
        --marker)
            [ $# -ge 2 ] || usage
            marker=$2
            shift
            ;;
        --)
            shift
            break
            ;;
        -*) usage ;;
        *) break ;;
        esac
        shift
    done
    [ $# -eq 1 ] && [ -n "$1" ] || usage
    target=$1
    marker=${marker:-$target.afterimage}
    # A leading dash would be an option to others.
    case $target in -*) target=./$target ;; esac
    case $marker in -*) marker=./$marker ;; esac
}

# Compares the files in "$@" with the lines in $want.
compare() {
    [ $# -gt 0 ] || return 0
    [ $sums = yes ] || return 0
    found=$(cd "$here/" && cksum "$@") || die "$here is not whole; copy it again"
    [ "$found" = "$want" ] && return 0
    for name; do
        case "
$want
" in
        *"
$(cd "$here/" && cksum "$name")
"*) ;;
        *) die "$here/$name is damaged; copy it again" ;;
        esac
    done
    die "$here is damaged; copy it again"
}

verify() {
    sums=yes
    command -v cksum > /dev/null || sums=no
    [ $sums = yes ] || echo 'apply: there is no cksum here, so only the lengths of the files are checked' >&2
    count=0
    want=
    set --
    while read -r crc length name; do
        count=$((count + 1))
        if [ $sums = no ]; then
            [ "$(stat -L -c %s "$here/$name")" -eq "$length" ] || die "$here/$name is not whole; copy it again"
        fi
        set -- "$@" "$name"
        want="$want${want:+
}$crc $length $name"
        if [ $# -eq 256 ]; then
            compare "$@"
            want=
            set --
        fi
    done < "$here/cksums"
    compare "$@"
    [ "$count" -eq "$lines" ] || die "$here/cksums has $count lines, not $lines; copy it again"
}

# Finds out what the target is.
look() {
    if [ -b "$target" ]; then
        kind=device
    elif [ -f "$target" ]; then
        kind=file
    elif [ -e "$target" ] || [ -h "$target" ]; then
        die "$target is neither a file nor a block device"
    elif [ "$from" = - ]; then
        kind=new
    else
        die "$target is not there, and this begins at $from_name"
    fi
    if [ $kind = device ]; then
        # The last sector must be there.
        got=$(dd if="$target" bs=512 skip=$((to_size / 512 - 1)) count=1 2> /dev/null | wc -c) || got=0
        [ "$to_size" -eq 0 ] || [ "$got" -eq 512 ] || die "$target is smaller than $to_size bytes"
    fi
}

# Decides by the marker whether the target may be written; ends the script when there is nothing to do.
allow() {
    word=
    one=
    two=
    rest=
    key=
    when=
    # What is not there is in no state.
    if [ -f "$marker" ] && [ $kind != new ]; then
        { read -r word one two rest && read -r key when; } < "$marker" || :
    fi
    [ -z "$force" ] || return 0
    if [ "$word" = state ] && [ "$one" = "$to" ]; then
        untouched "$to_size" "$to_name"
        echo "$target is at $to_name already"
        exit 0
    fi
    if [ "$word" = applying ] && [ "$one" = "$from" ] && [ "$two" = "$to" ]; then
        return 0
    fi
    if [ "$from" = - ]; then
        case $word in state | applying) return 0 ;; esac
        [ $kind = new ] && return 0
        [ $kind = file ] && [ ! -s "$target" ] && return 0
        die "$target holds something that is not from here; --force overwrites it with $to_name"
    fi
    case $word in
    state)
        [ "$one" = "$from" ] ||
            die "$target is at $two${rest:+ $rest} ($one), and this begins at $from_name ($from); --force applies it all the same"
        ;;
    applying) die "another increment ($one to $two) was begun on $target; finish that one first" ;;
    *) die "nothing says that $target is at $from_name ($from): $marker is missing; --force applies it all the same" ;;
    esac
    untouched "$from_size" "$from_name"
}

# Checks that a file is as long as a state, and was not written to since its marker says that it is in it.
untouched() {
    [ $kind = file ] || return 0
    size=$(stat -L -c %s "$target")
    [ "$size" -eq "$1" ] || die "$target has $size bytes, and $2 has $1"
    [ "$key" = modified ] || return 0
    [ "$(stat -L -c %Y "$target")" = "$when" ] ||
        die "$target was written to since it was brought to $2; --force applies $to_name all the same"
}

settle() {
    sync "$1" 2> /dev/null || sync
}

mark() {
    printf '%s\n' "$1" > "$marker.new"
    settle "$marker.new"
    mv -f "$marker.new" "$marker"
    settle "$(dirname "$marker")"
}

resize() {
    [ $kind != device ] || return 0
    # Without anything to keep, emptying it makes all of it zeros.
    [ "$from" != - ] || : > "$target"
    truncate -s "$to_size" "$target" || die "cannot make $target $to_size bytes long"
}

# Moves the position of descriptor 3 to a block. (Not descriptor 1: bash 5.2 loses the number in `1<>` inside `$( )`.)
seek() {
    dd bs=4096 seek="$1" count=0 conv=notrunc < /dev/null >&3
}

# Makes a range zeros: offset, length.
blank() {
    if [ $punches = yes ]; then
        fallocate -p -o "$1" -l "$2" "$target" 2> /dev/null && return 0
        punches=no
    fi
    if [ $kind != device ] && [ $(($1 + $2)) -eq "$to_size" ]; then
        truncate -s "$1" "$target" && truncate -s "$to_size" "$target" && return 0
    fi
    said=$({ seek $(($1 / 4096)) && head -c "$2" /dev/zero >&3; } 2>&1 3<> "$target") ||
        die "cannot write $2 bytes at $1 of $target: $said"
}

blanks() {
    # A file that was just emptied has nothing else.
    [ "$from" != - ] || [ $kind = device ] || return 0
    while read -r offset length; do
        blank "$offset" "$length"
    done < "$here/zeros"
}

# Writes a data file: its name.
put() {
    offset=${1%%-*}
    offset=${offset#"${offset%%[!0]*}"}
    block=$((${offset:-0} / 4096))
    if [ "$2" -le 1048576 ]; then
        said=$(dd if="$here/$1" of="$target" bs=4096 seek="$block" conv=notrunc 2>&1) && return 0
    else
        # From there on in large pieces.
        said=$({ seek "$block" && dd bs=1048576 >&3; } 2>&1 < "$here/$1" 3<> "$target") && return 0
    fi
    die "cannot write $here/$1 to $target: $said"
}

puts() {
    while read -r crc length name; do
        case $name in *.bin) put "$name" "$length" ;; esac
    done < "$here/cksums"
}

main() {
    options "$@"
    look
    allow
    verify
    mark "applying $from $to"
    resize
    blanks
    puts
    settle "$target"
    if [ $kind = device ]; then
        mark "state $to $to_name"
    else
        mark "state $to $to_name
modified $(stat -L -c %Y "$target")"
    fi
    echo "$target is at $to_name"
}

main "$@"
