import { readFileSync, realpathSync } from 'node:fs'
import { basename, join } from 'node:path'

/** What kind of TPM this is, as far as it can be told from outside. A maker's name is not proof: the EK certificate is. */
export type TpmKind = 'discrete' | 'firmware' | 'virtual' | 'simulator' | 'unknown'

export interface BoardFacts {
  /** Model as the device tree says it; null where there is none (PCs). */
  readonly model: string | null
  readonly raspberryPi: boolean
  /** Signed boot of the Raspberry Pi's own bootloader, locked by its fuses; null on other boards and where it is not told. */
  readonly signedBoot: boolean | null
  /** Driver of the first TPM, such as `tpm_tis_spi`; null when there is none. */
  readonly driver: string | null
  readonly bus: 'SPI' | 'I2C' | null
}

const read = (root: string, path: string): Buffer | null => {
  try {
    return readFileSync(join(root, path))
  } catch {
    return null
  }
}

const link = (root: string, path: string): string | null => {
  try {
    return basename(realpathSync(join(root, path)))
  } catch {
    return null
  }
}

/** `/chosen/bootloader/signed`: bit 0, boot images have to be signed; bit 3, the customer's key is in the fuses. One without the other protects nothing. */
const signedBits = 0x9

/** Reads what the kernel tells of this machine. `root`: `/`, or a folder that stands for it. */
export const readBoard = (root: string): BoardFacts => {
  const model = read(root, 'proc/device-tree/model')?.toString('utf8').replaceAll('\0', '').trim() ?? null
  const raspberryPi = model?.startsWith('Raspberry Pi') === true
  const signed = raspberryPi ? read(root, 'proc/device-tree/chosen/bootloader/signed') : null
  const driver = link(root, 'sys/class/tpm/tpm0/device/driver')
  return {
    model: model === '' ? null : model,
    raspberryPi,
    signedBoot: signed === null || signed.length !== 4 ? null : (signed.readUInt32BE(0) & signedBits) === signedBits,
    driver,
    bus: driver === null ? null : driver.includes('spi') ? 'SPI' : driver.includes('i2c') ? 'I2C' : null,
  }
}

/** TCG vendor ids of makers whose TPM is a chip of its own, is firmware of the processor, or is given by a hypervisor. */
const makers: Readonly<Record<string, TpmKind>> = {
  IFX: 'discrete',
  STM: 'discrete',
  NTC: 'discrete',
  NTZ: 'discrete',
  ATML: 'discrete',
  INTC: 'firmware',
  AMD: 'firmware',
  QCOM: 'firmware',
  MSFT: 'virtual',
  VMW: 'virtual',
  GOOG: 'virtual',
  IBM: 'virtual',
  FKSM: 'simulator',
}

/** Pure. `manufacturer`: as the TPM says it. The kernel's driver for a firmware TPM says more than the maker, who may build both. */
export const tpmKind = (manufacturer: string, { driver }: Pick<BoardFacts, 'driver'>): TpmKind => {
  const own = Object.hasOwn(makers, manufacturer) ? (makers[manufacturer] ?? 'unknown') : 'unknown'
  if (own === 'simulator' || driver === null) return own
  if (driver.includes('spi') || driver.includes('i2c')) return 'discrete'
  if (driver.includes('ftpm')) return 'firmware'
  return driver.includes('vtpm') ? 'virtual' : own
}
