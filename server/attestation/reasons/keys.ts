import type { Reason, ReasonTable } from './reason.ts'

/** The five keys of a device that have a public area of the TPM. */
export type KeyRole = 'ek' | 'ak' | 'srk' | 'ldevid' | 'recipient'
/** Bits of TPMA_OBJECT by name, in the order in which they are judged: those that decide whether the key can leave or lie come first. */
export const attributeBits = [
  'fixed-tpm',
  'fixed-parent',
  'sensitive-data-origin',
  'restricted',
  'sign',
  'decrypt',
  'encrypted-duplication',
  'admin-with-policy',
  'user-with-auth',
  'st-clear',
  'no-da',
  'x509-sign',
  'reserved',
] as const
export type AttributeBit = (typeof attributeBits)[number]
export type AttributeCode = `${KeyRole}.attributes.${'' | 'not-'}${AttributeBit}`

const title = { ek: 'EK', ak: 'AK', srk: 'SRK', ldevid: 'LDevID key', recipient: 'recipient key' } as const satisfies Record<KeyRole, string>
/** Numbers of the acceptance list, by role: what a wrong public area of it is. */
const cases = { ek: [7], ak: [16], srk: [22], ldevid: [21], recipient: [23] } as const satisfies Record<KeyRole, readonly number[]>

/** What each bit means when it is set, and what the wrong value lets an attacker do. */
const bits: Readonly<Record<AttributeBit, { readonly means: string; readonly set: string; readonly clear: string }>> = {
  'fixed-tpm': { means: 'fixedTPM: it cannot leave its TPM', set: 'No attack; not our template.', clear: 'A key that can be duplicated into software.' },
  'fixed-parent': {
    means: 'fixedParent: it cannot move to another parent',
    set: 'No attack; not our template.',
    clear: 'A key that can be moved below a parent of the attacker.',
  },
  'sensitive-data-origin': {
    means: 'sensitiveDataOrigin: the TPM made the secret itself',
    set: 'No attack; not our template.',
    clear: 'A key that was made in software and imported: a copy exists.',
  },
  restricted: {
    means: 'restricted: it signs or opens only what the TPM made',
    set: 'A key for TPM structures posing as a key for messages.',
    clear: 'A key that signs invented attestations, or opens what was meant for the TPM.',
  },
  sign: { means: 'sign: it can sign', set: 'A storage key that signs: one key, two purposes.', clear: 'A key that cannot have signed.' },
  decrypt: {
    means: 'decrypt: it can decrypt',
    set: 'A signing key that also decrypts: one key, two purposes.',
    clear: 'A key that nothing can be wrapped to.',
  },
  'encrypted-duplication': {
    means: 'encryptedDuplication: duplicates are encrypted',
    set: 'A key that is meant to be duplicated.',
    clear: 'A key whose duplicates are in the clear.',
  },
  'admin-with-policy': {
    means: 'adminWithPolicy: administration needs the policy',
    set: 'A policy with a branch of its own decides over the key.',
    clear: 'An EK that can be administered by password.',
  },
  'user-with-auth': {
    means: 'userWithAuth: a password is enough to use it',
    set: 'A key that works without the policy it should be under.',
    clear: 'A policy of its own decides who uses the key.',
  },
  'st-clear': { means: 'stClear: it is gone after TPM Restart', set: 'A key that does not survive a restart.', clear: 'No attack; not our template.' },
  'no-da': {
    means: 'noDA: not subject to the dictionary-attack lockout',
    set: 'An EK that can be guessed at without lockout.',
    clear: 'A machine key that somebody else can lock out.',
  },
  'x509-sign': { means: 'x509sign: it signs only X.509', set: 'A key for certificates posing as another.', clear: 'No attack; not our template.' },
  reserved: { means: 'a reserved bit', set: 'A structure that parsers read differently.', clear: 'No attack; not our template.' },
}

const numbered: Readonly<Partial<Record<`${KeyRole}.${'' | 'not-'}${AttributeBit}`, readonly number[]>>> = {
  'ak.not-fixed-tpm': [11],
  'ak.not-fixed-parent': [12],
  'ak.not-sensitive-data-origin': [13],
  'ak.not-restricted': [14],
  'ak.decrypt': [15],
  'ak.not-sign': [15],
}

const made = 'Make the key with the template of docs/protocol.md; the agent does.'
const roles = Object.keys(title) as readonly KeyRole[]

/** The bits each role must have; the rest must be clear. Either way round where two templates are in use. */
export const expectedBits: Readonly<Record<KeyRole, readonly AttributeBit[]>> = {
  ek: ['fixed-tpm', 'fixed-parent', 'sensitive-data-origin', 'restricted', 'decrypt', 'admin-with-policy'],
  ak: ['fixed-tpm', 'fixed-parent', 'sensitive-data-origin', 'restricted', 'sign', 'user-with-auth', 'no-da'],
  srk: ['fixed-tpm', 'fixed-parent', 'sensitive-data-origin', 'restricted', 'decrypt', 'user-with-auth', 'no-da'],
  ldevid: ['fixed-tpm', 'fixed-parent', 'sensitive-data-origin', 'sign', 'user-with-auth', 'no-da'],
  recipient: ['fixed-tpm', 'fixed-parent', 'sensitive-data-origin', 'decrypt', 'user-with-auth', 'no-da'],
}
/** `user-with-auth` is set in EKs of the high range, and clear in keys under a firmware policy. */
const either: ReadonlySet<string> = new Set(['ek.user-with-auth', 'ldevid.user-with-auth', 'recipient.user-with-auth'])

const attributeRow = (role: KeyRole, bit: AttributeBit, clear: boolean): [AttributeCode, Reason] => {
  const code = `${clear ? 'not-' : ''}${bit}` as const
  return [
    `${role}.attributes.${code}`,
    {
      cases: numbered[`${role}.${code}`] ?? cases[role],
      meaning: `The ${title[role]} ${clear ? 'lacks' : 'has'} ${bits[bit].means}.`,
      attack: clear ? bits[bit].clear : bits[bit].set,
      remedy: made,
    },
  ]
}

const attributeReasons = Object.fromEntries(
  roles.flatMap((role) =>
    attributeBits.flatMap((bit) => {
      const expected = expectedBits[role].includes(bit)
      return [true, false].filter((clear) => clear === expected || either.has(`${role}.${bit}`)).map((clear) => attributeRow(role, bit, clear))
    }),
  ),
) as Readonly<Record<AttributeCode, Reason>>

const areaFaults = {
  malformed: {
    meaning: 'has a public area that is no TPMT_PUBLIC: trailing bytes, lengths or algorithms that do not exist',
    attack: 'What two parsers read differently.',
  },
  algorithm: { meaning: 'is of another kind of key than its template', attack: 'A key type whose checks were never made.' },
  'name-algorithm': { meaning: 'has another name algorithm than its template (SHA-1)', attack: 'Two keys with one name.' },
  policy: { meaning: 'has another authorisation policy than expected', attack: 'A policy with a branch that duplicates the key, or that lets anybody use it.' },
  scheme: { meaning: 'has another scheme than its template (none, or SHA-1)', attack: 'Signatures in a scheme of the attacker’s choice.' },
  symmetric: { meaning: 'has another symmetric algorithm than its template', attack: 'What is wrapped to it is weakly encrypted.' },
  curve: { meaning: 'is on another curve than P-256 (or P-384 where that is allowed): P-192, BN', attack: 'A curve whose keys can be had.' },
  'key-size': { meaning: 'is an RSA key of another size than its template, or below 2048 bits', attack: 'A modulus that can be factored.' },
  exponent: { meaning: 'is an RSA key with another exponent than 65537', attack: 'Small exponents open textbook attacks.' },
  point: {
    meaning: 'is a point that is not on its curve, or coordinates of the wrong length',
    attack: 'Invalid-curve attacks read the secret of whoever computes with it.',
  },
} as const
export type AreaFault = keyof typeof areaFaults
export type AreaCode = `${KeyRole}.${AreaFault}`

const areaCases = (role: KeyRole, fault: AreaFault): readonly number[] => {
  if (fault === 'malformed') return [20]
  if (role === 'ak') return fault === 'policy' ? [16] : [17]
  if (role === 'ek') return fault === 'curve' || fault === 'key-size' || fault === 'exponent' || fault === 'point' ? [8] : [7]
  return cases[role]
}

const areaReasons = Object.fromEntries(
  roles.flatMap((role) =>
    (Object.keys(areaFaults) as AreaFault[]).map((fault): [AreaCode, Reason] => [
      `${role}.${fault}`,
      { cases: areaCases(role, fault), meaning: `The ${title[role]} ${areaFaults[fault].meaning}.`, attack: areaFaults[fault].attack, remedy: made },
    ]),
  ),
) as Readonly<Record<AreaCode, Reason>>

const singleReasons = {
  'ek.roca': {
    cases: [8],
    meaning: 'The RSA modulus of the EK has the structure of the broken key generator of CVE-2017-15361 (ROCA).',
    attack: 'The private key can be computed from the public one.',
    remedy: 'Update the TPM firmware and make a new EK, or replace the hardware.',
  },
  'key.parent-not-certified': {
    cases: [22],
    meaning: 'The AK has not certified the SRK that keys would be wrapped to.',
    attack: 'A software parent: every delivered key could be read outside the TPM.',
    remedy: made,
  },
  'ldevid.name': {
    cases: [21],
    meaning: 'The AK has certified another key than the presented LDevID key.',
    attack: 'A software key gets the identity of a device.',
    remedy: made,
  },
  'recipient.name': {
    cases: [23],
    meaning: 'The AK has certified another key than the presented recipient key.',
    attack: 'A software key that keys are wrapped to.',
    remedy: made,
  },
  'csr.ldevid': {
    cases: [21],
    meaning: 'The LDevID request is no PKCS #10 request that its own key signed.',
    attack: 'A certificate for a key that the requester does not have.',
    remedy: made,
  },
  'csr.ldevid.other-key': {
    cases: [21],
    meaning: 'The LDevID request is for another key than the certified one.',
    attack: 'A software key gets the identity of a device.',
    remedy: made,
  },
  'csr.tls': {
    cases: [21],
    meaning: 'The TLS request is no PKCS #10 request that its own key signed.',
    attack: 'A certificate for a key that the requester does not have.',
    remedy: made,
  },
  'csr.tls.same-key': {
    cases: [21],
    meaning: 'The TLS key is the LDevID key.',
    attack: 'A key in memory of the operating system would be the identity.',
    remedy: made,
  },
  'csr.tls.binding': {
    cases: [21],
    meaning: 'The LDevID key has not signed for this TLS key and this challenge.',
    attack: "Somebody else's TLS key under the identity of the device.",
    remedy: made,
  },
} as const satisfies ReasonTable

/** AK, SRK, LDevID and recipient key, and the EK's own public area. */
export const keyReasons = { ...singleReasons, ...areaReasons, ...attributeReasons }
