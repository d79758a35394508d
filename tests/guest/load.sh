#!/bin/busybox sh
# load NAME: writes numbered files into /NAME until /tmp/stop is there, and says of each on the console that it is synced.
#
# Beside them it overwrites one block again and again, /NAME/last: the number of the newest file.
name=$1
number=0
mkdir -p "/$name"
until [ -e /tmp/stop ]; do
    number=$((number + 1))
    size=$((1000 + number % 50 * 997))
    yes "file $number of $name" | head -c $size | dd of="/$name/$number" bs=64k conv=fsync 2> /dev/null || exit 1
    printf '%09d\n' $number | dd of="/$name/last" conv=notrunc,fsync 2> /dev/null || exit 1
    echo "synced $name $number" > /dev/console
done
echo "stopped $name" > /dev/console
