#!/bin/busybox sh
# The first process of a test guest, from its disk: runs what the host sends over the second serial port.
#
# A request is a line "NUMBER SCRIPT", the answer a line "NUMBER EXIT-STATUS OUTPUT"; script and output are base64.
# The first line of all is "ready BOOT-ID".
export PATH=/bin
mount -t tmpfs tmp /tmp
exec < /dev/ttyS1 > /dev/ttyS1 2> /dev/console
stty raw -echo
echo "ready $(cat /proc/sys/kernel/random/boot_id)"
while read -r number script; do
    echo "$script" | base64 -d > /tmp/script
    sh -e /tmp/script < /dev/null > /tmp/output 2>&1
    status=$?
    echo "$number $status $(base64 -w 0 /tmp/output)"
done
