#!/bin/sh
# Take out of the packages in the folder $1 what the service never loads, a quarter of them: tests, ONNX Runtime's library
# for other languages, and codecs of formats that images.py and medical.py do not read.
set -eu
cd "$1"
find . -type d -name tests -prune -exec rm -r {} +
rm onnxruntime/capi/libonnxruntime.so.*
cd imagecodecs
find . -name '_*.so' ! -name '_shared*' ! -name '_imcd.*' ! -name '_jpeg8.*' ! -name '_jpegls.*' ! -name '_jpeg2k.*' \
  ! -name '_zlib.*' ! -name '_deflate.*' ! -name '_ccitt.*' -delete
for library in ../imagecodecs.libs/*; do
  ldd ./*.so | grep -q "${library##*/}" || rm "$library"
done
