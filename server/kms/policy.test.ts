import { expect, test } from 'vitest'
import { boolean, der, explicit, number, octetString, sequence, tags } from '@fleetkey/protocol/x509/der.ts'
import { mustMatch } from './policy.ts'

const oid = (...bytes: number[]): Uint8Array => der(tags.oid, Uint8Array.from(bytes))
const empty = sequence()
const extension = (id: Uint8Array, value: Uint8Array): Uint8Array => sequence(id, boolean(true), octetString(value))
const basic = (ca: boolean): Uint8Array => extension(oid(0x55, 0x1d, 0x13), ca ? sequence(boolean(true)) : empty)
const usage = (last: number): Uint8Array => extension(oid(0x55, 0x1d, 0x25), sequence(oid(0x2b, 6, 1, 5, 5, 7, 3, last)))
/** A TBSCertificate, RFC 5280 §4.1, of which only what decides is filled in. */
const certificate = (...extensions: Uint8Array[]): Uint8Array =>
  sequence(explicit(0, number(2)), number(7), empty, empty, empty, empty, empty, ...(extensions.length === 0 ? [] : [explicit(3, sequence(...extensions))]))
const version1 = sequence(number(7), empty, empty, empty, empty, empty)
const list = sequence(number(1), empty, empty, der(tags.utcTime, Buffer.from('270101000000Z')))
const responseData = sequence(explicit(1, empty), der(tags.generalizedTime, Buffer.from('20270101000000Z')), empty)
const message = Uint8Array.of(0x84, 0x6a, ...Buffer.from('Signature1'))
/** Digest and reference of an approval, which begin as a SEQUENCE of their very length does. */
const unlucky = Uint8Array.of(0x30, 62, ...new Uint8Array(62).fill(0xa5))

test.for([
  ['the root makes a CA', 'root-ca', certificate(basic(true)), true],
  ['an OCSP responder', 'root-ca', certificate(basic(false), usage(9)), true],
  ['a list', 'root-ca', list, true],
  ['no device', 'root-ca', certificate(basic(false), usage(2)), false],
  ['nothing without extensions', 'root-ca', certificate(), false],
  ['the issuing CA makes a device', 'issuing-ca', certificate(basic(false), usage(2)), true],
  ['a list', 'issuing-ca', list, true],
  ['no CA', 'issuing-ca', certificate(usage(2), basic(true)), false],
  ['no CA whose second constraints say it', 'issuing-ca', certificate(basic(false), basic(true)), false],
  ['no version 1', 'issuing-ca', version1, false],
  ['no message', 'issuing-ca', message, false],
  ['nothing that follows a certificate', 'issuing-ca', Buffer.concat([certificate(basic(false)), Uint8Array.of(0)]), false],
  ['nothing cut', 'issuing-ca', certificate(basic(false)).subarray(0, -1), false],
  ['nothing empty', 'issuing-ca', new Uint8Array(0), false],
  ['an OCSP responder answers', 'ocsp-signing', responseData, true],
  ['and makes no certificate', 'ocsp-signing', certificate(basic(false)), false],
  ['nor a list', 'ocsp-signing', list, false],
  ['a message key signs messages', 'delivery-signing', message, true],
  ['no certificate', 'delivery-signing', certificate(basic(false)), false],
  ['no version 1', 'challenge-signing', version1, false],
  ['no list', 'group-signing', list, false],
  ['the release key signs whatever digest there is', 'release-signing', unlucky, true],
  ['the log signs text that begins with a nought', 'audit-signing', Buffer.from('0 is a digit'), true],
] as const)('%s (%s)', ([, purpose, data, allowed]) => {
  if (allowed) expect(() => mustMatch(purpose, data)).not.toThrow()
  else expect(() => mustMatch(purpose, data)).toThrow(expect.objectContaining({ code: 'forbidden', reason: 'kms.content' }))
})
