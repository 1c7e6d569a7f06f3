import { createRequire } from 'node:module'
import { join } from 'node:path'
import { Problem } from '@fleetkey/protocol/problem.ts'

/** Handle of a session, a slot or an object. */
export type Handle = Buffer

export interface Attribute {
  readonly type: number
  readonly value?: Buffer | boolean | number | string
}

export interface Mechanism {
  readonly mechanism: number
  readonly parameter: null | { readonly type: number; readonly iv: Buffer; readonly ivBits: number; readonly aad: Buffer; readonly tagBits: number }
}

/**
 * What is used of pkcs11js 2.1 (PKCS#11 2.40). Every call throws an error that `returnValue` reads. The Async ones run on another thread and keep no hold of
 * the buffers that they are given: the caller has to, until they settle.
 */
export interface Cryptoki {
  load(library: string): void
  C_Initialize(options: { readonly flags: number }): void
  C_Finalize(): void
  C_GetSlotList(withToken: boolean): readonly Handle[]
  C_GetTokenInfo(slot: Handle): { readonly label: string; readonly serialNumber: string; readonly flags: number; readonly maxSessionCount: number }
  C_OpenSession(slot: Handle, flags: number): Handle
  C_CloseSession(session: Handle): void
  C_Login(session: Handle, user: number, pin: string): void
  C_FindObjectsInit(session: Handle, template: readonly Attribute[]): void
  C_FindObjects(session: Handle, most: number): readonly Handle[]
  C_FindObjectsFinal(session: Handle): void
  C_GetAttributeValue(session: Handle, object: Handle, template: readonly Attribute[]): readonly { readonly type: number; readonly value: Buffer }[]
  C_DestroyObject(session: Handle, object: Handle): void
  C_GenerateKey(session: Handle, mechanism: Mechanism, template: readonly Attribute[]): Handle
  C_GenerateKeyPair(
    session: Handle,
    mechanism: Mechanism,
    publicTemplate: readonly Attribute[],
    privateTemplate: readonly Attribute[],
  ): { readonly publicKey: Handle; readonly privateKey: Handle }
  C_SignInit(session: Handle, mechanism: Mechanism, key: Handle): void
  C_Sign(session: Handle, data: Buffer, out: Buffer): Buffer
  C_SignAsync(session: Handle, data: Buffer, out: Buffer): Promise<Buffer>
  C_EncryptInit(session: Handle, mechanism: Mechanism, key: Handle): void
  C_EncryptAsync(session: Handle, data: Buffer, out: Buffer): Promise<Buffer>
  C_DecryptInit(session: Handle, mechanism: Mechanism, key: Handle): void
  C_DecryptAsync(session: Handle, data: Buffer, out: Buffer): Promise<Buffer>
}

/** PKCS#11 2.40, pkcs11t.h. */
export const ck = {
  initialize: { osLocking: 0x02 },
  session: { rw: 0x02, serial: 0x04 },
  user: 1,
  flag: { finalTry: 0x0002_0000, locked: 0x0004_0000 },
  object: { publicKey: 2, privateKey: 3, secretKey: 4 },
  keyType: { ec: 3, aes: 0x1f },
  attribute: {
    class: 0x000,
    token: 0x001,
    private: 0x002,
    label: 0x003,
    keyType: 0x100,
    id: 0x102,
    sensitive: 0x103,
    encrypt: 0x104,
    decrypt: 0x105,
    wrap: 0x106,
    unwrap: 0x107,
    sign: 0x108,
    verify: 0x10a,
    valueLength: 0x161,
    extractable: 0x162,
    neverExtractable: 0x164,
    alwaysSensitive: 0x165,
    modifiable: 0x170,
    ecParameters: 0x180,
    ecPoint: 0x181,
  },
  mechanism: { ecKeyPairGen: 0x1040, ecdsa: 0x1041, aesKeyGen: 0x1080, aesGcm: 0x1087 },
  /** Kind of parameter, of pkcs11js: AES-GCM as PKCS#11 2.40 has it. */
  gcm: 7,
} as const

/** CKR_…, of those that are told apart. */
export const rv = {
  pinIncorrect: 0xa0,
  pinInvalid: 0xa1,
  pinLength: 0xa2,
  pinExpired: 0xa3,
  pinLocked: 0xa4,
  alreadyLoggedIn: 0x100,
  alreadyInitialized: 0x191,
} as const

/** Name and number of what a PKCS#11 call returned; undefined when the error is of another kind. */
export const returnValue = (thrown: unknown): { readonly name: string; readonly code: number } | undefined => {
  if (!(thrown instanceof Error)) return undefined
  const [, name, code] = /(CKR_\w+)(?::(\d+))?/.exec(thrown.message) ?? []
  if (name === undefined) return undefined
  return { name, code: code === undefined && 'code' in thrown ? Number(thrown.code) : Number(code) }
}

/** For a log line. */
export const said = (thrown: unknown): string => returnValue(thrown)?.name ?? (thrown instanceof Error ? thrown.message : String(thrown)).slice(0, 300)

/** Loads the add-on that `fleetkey kms install-pkcs11` has built in that folder. Throws Problem('unavailable', reason `kms.pkcs11`). */
export const loadAddon = (folder: string): Cryptoki => {
  try {
    const { PKCS11 } = createRequire(import.meta.url)(join(folder, 'index.js')) as { readonly PKCS11: new () => Cryptoki }
    return new PKCS11()
  } catch (cause) {
    throw new Problem('unavailable', `pkcs11js is not in ${folder}: install it with \`fleetkey kms install-pkcs11\` (${said(cause).split('\n')[0] ?? ''})`, {
      reason: 'kms.pkcs11',
      cause,
    })
  }
}
