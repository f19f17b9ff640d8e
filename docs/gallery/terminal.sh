#!/bin/sh
# Runs a command in a terminal with 80 columns on a screen that nobody sees, and takes a picture of it once it has ended.
#   sh docs/gallery/terminal.sh PICTURE COMMAND ...
picture=$1; shift
ended=$(mktemp -u)
export ended
exec xvfb-run -a sh -c '
  picture=$1; shift
  xterm -title shot -geometry 80x62+0+0 -fa "DejaVu Sans Mono" -fs 10 -bg "#1b1b1b" -fg "#e6e6e6" -b 8 \
    -e sh -c "printf \"\$ %s\n\" \"\$*\"; \"\$@\"; touch \"\$ended\"; sleep 60" sh "$@" &
  until [ -e "$ended" ]; do sleep 1; done
  sleep 1; rm "$ended"
  import -window "$(xdotool search --name "^shot$" | tail -n 1)" "$picture"
  kill $!
' sh "$picture" "$@"
