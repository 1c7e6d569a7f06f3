import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe } from 'vitest'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { openFileKms } from '@fleetkey/server/kms/file.ts'
import { startKms } from '@fleetkey/server/kms/supervisor.ts'
import { awsBackend, startAwsKms, type AwsKms } from './aws-kms.ts'
import { kmsConformance } from './conformance/kms.ts'
import { hasSoftHsm, openSoftHsm } from './softhsm.ts'

const folder = mkdtempSync(join(tmpdir(), 'fleetkey-kms-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
let count = 0

const inFolder = (options: Parameters<typeof openFileKms>[1]) => async () => {
  const own = join(folder, String(++count))
  const again = async () => await openFileKms(own, options)
  return { kms: await again(), again }
}

kmsConformance('file, key file', inFolder({}))
kmsConformance('file, passphrase', inFolder({ passphrase: new Secret(Buffer.from('correct horse battery')) }))

const behindSocket = (passphraseFile: string | null) => async () => {
  const own = join(folder, String(++count))
  const again = async () => await startKms({ folder: own, backend: { kind: 'file', passphraseFile, keyFile: null }, log: () => undefined })
  return { kms: await again(), again }
}
const passphraseFile = join(folder, 'passphrase')
writeFileSync(passphraseFile, 'correct horse battery\n', { mode: 0o600 })

kmsConformance('process, key file', behindSocket(null))
kmsConformance('process, passphrase', behindSocket(passphraseFile))

describe.skipIf(!hasSoftHsm())('PKCS#11', () => {
  kmsConformance('process, SoftHSM', async () => {
    const own = join(folder, String(++count))
    const { backend } = openSoftHsm(`${own}-token`)
    const again = async () => await startKms({ folder: own, backend, log: () => undefined })
    return { kms: await again(), again }
  })
})

describe('AWS KMS', () => {
  let aws: AwsKms
  beforeAll(async () => void (aws = await startAwsKms()))
  afterAll(async () => await aws.stop())

  kmsConformance('process, AWS KMS (a local server that speaks its API)', async () => {
    const own = join(folder, String(++count))
    const again = async () => await startKms({ folder: own, backend: awsBackend(aws), log: () => undefined })
    return { kms: await again(), again }
  })
})
