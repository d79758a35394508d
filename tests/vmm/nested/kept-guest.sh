#!/bin/busybox sh
# The first process of a guest that is saved while it runs and goes on from that. Each line that begins with "guest:" or
# "count" is looked at.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for pass in 1 2 3 4 5; do
    for module in /modules/*.ko; do
        insmod "$module" 2> /dev/null && rm "$module"
    done
done
until [ -b /dev/vda ]; do sleep 0.2; done
mount -t ext4 /dev/vda /mnt || { echo "guest: no root"; poweroff -f; }
: > /running
count() {
    n=0
    while [ -e /running ]; do
        n=$((n + 1))
        echo "count $n"
        sleep 0.2
    done
    echo "$n" > /counted
}
write() {
    n=0
    while [ -e /running ]; do
        n=$((n + 1))
        echo "$n" >> /mnt/lines
        sync -d /mnt/lines
    done
    echo "$n" > /written
}
count &
write &
dmesg -c > /dev/null
echo "guest: begun"
read line
echo "guest: heard $line"
rm /running
until [ -e /counted ] && [ -e /written ]; do sleep 0.2; done
echo "guest: counted $(cat /counted)"
seq "$(cat /written)" | cmp - /mnt/lines && echo "guest: every line is there"
echo "guest: told that it is another $(dmesg | grep -c 'virtual machine fork') times"
dmesg | grep -iE 'lockup|stall|unstable|BUG:|WARNING|hung task|I/O error|EXT4-fs (error|warning)' |
    sed 's/^/guest: complains /'
umount /mnt && echo "guest: off"
poweroff -f
